"""Run under torchrun by test_sequence: passes split over ranks, against the same model alone in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from preference_runs import make_groups, make_model, reference_free_loss
from sample_groups import SCENARIOS, five_levels, tokens
from tiny_experts import known_families, tiny_experts
from tiny_models import build_model, tiny_model, tiny_reward_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Gemma2Config, Qwen2Config
from two_processes import leave_together

import kvpref
from kvpref.models.support import unwrap
from kvpref.tracing import observe_marks

TOLERANCE = 1e-10  # float64 throughout: only the order of sums differs

_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
_WINDOW_AND_FULL = ["sliding_attention", "full_attention"]
_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "head_dim": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model("llama", torch.float64, **_HEADS),
    "gpt2": lambda: tiny_model("gpt2", torch.float64),
    "windows": lambda: build_model(
        Qwen2Config(**_SIZES, **_HEADS, use_sliding_window=True, sliding_window=5, max_window_layers=1), torch.float64
    ),
    "softcap": lambda: build_model(Gemma2Config(**_SIZES, **_HEADS, sliding_window=7), torch.float64),
    "sinks": lambda: tiny_experts("gpt_oss", **_HEADS, sliding_window=6, layer_types=_WINDOW_AND_FULL),
    "latent": lambda: tiny_experts("deepseek_v3"),
    "rewards": lambda: tiny_reward_model("llama", torch.float64, **_HEADS),
}


CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama", "five_levels", {"mode": "two_pass"}),
    ("windows", "five_levels", {"mode": "one_pass"}),
    ("softcap", "story_questions_answers", {"mode": "packed"}),
    ("sinks", "five_levels", {"mode": "two_pass", "checkpoint": "all"}),
    ("latent", "pairs", {"mode": "two_pass"}),
    ("gpt2", "single_responses", {"mode": "two_pass", "checkpoint": "prefix"}),
    ("windows", "five_levels", {"schedule": "bounded", "max_tokens_per_chunk": 5}),
    ("sinks", "five_levels", {"schedule": "bounded", "max_tokens_per_chunk": 7, "checkpoint": "all"}),
    ("softcap", "shared_system_prompt", {"schedule": "bounded", "max_tokens_per_chunk": 3}),
    ("latent", "story_questions_answers", {"schedule": "bounded"}),
    ("llama", "pairs", {"prefix_grad": False}),
    ("windows", "attempts", {"mode": "two_pass"}),
    ("llama", "calls", {"schedule": "bounded", "max_tokens_per_chunk": 6}),
)
"""Model, groups and options; chunks and passes of fewer tokens than ranks are among them."""


@contextmanager
def split(model: Any) -> Iterator[Any]:
    """While the passes of a model are split over all ranks."""
    kvpref.sequence_parallel(model, distributed.group.WORLD)
    try:
        yield model
    finally:
        kvpref.sequence_parallel(model, None)


def run_cases() -> None:
    """Log-probs and gradients of each case."""
    for name, scenario, options in CASES:
        model = kvpref.attach(MODELS[name]())
        batch = kvpref.collate(SCENARIOS[scenario](), min_shared_tokens=1)
        truth = oracle.scheduled(model, batch, **options)
        with split(model):
            found = oracle.scheduled(model, batch, **options)
            assert oracle.worst_error(found, truth)[0] > 0.01, "each rank has the gradients of its own rows"
            kvpref.sum_sequence_gradients(model)
        assert_same(found.token_logps, truth.token_logps, f"{name} {scenario} {options}")
        error, where = oracle.worst_error(found._replace(grads=oracle.grads_of(model)), truth)
        assert error < TOLERANCE, f"{name} {scenario} {options}: {where} is off by {error:.1e}"


def run_outputs() -> None:
    """All that a loss can read, and its gradients; the two public passes; rewards."""
    model = kvpref.attach(MODELS["llama"]())
    kvpref.add_value_head(model)
    batch = kvpref.collate(five_levels(), min_shared_tokens=1)
    head = kvpref.HeadOptions(
        temperature=0.7, entropy=True, collision=True, mean_logits=True, hidden=True, values=True, logit_ids=(3, 5)
    )
    truth, true_grads = outputs_and_grads(model, lambda: kvpref.response_logps(model, batch, head=head))
    ways: list[Callable[[], Any]] = [
        lambda: kvpref.response_logps(model, batch, head=head),
        lambda: kvpref.score_responses(model, batch, kvpref.encode_prefix(model, batch), head=head),
    ]
    for way in ways:
        with split(model):
            found, grads = outputs_and_grads(model, way)
        for field, value in truth.items():
            assert_same(found[field], value, field)
        for parameter, grad in true_grads.items():
            assert_same(grads[parameter], grad, parameter)
    for options in ({}, {"schedule": "bounded", "max_tokens_per_chunk": 6}):
        model = kvpref.attach(MODELS["rewards"]())
        run = partial(run_rewards, model, batch, options)
        truth, true_grads = outputs_and_grads(model, run, backward=False)
        with split(model):
            found, grads = outputs_and_grads(model, run, backward=False)
        assert_same(found["rewards"], truth["rewards"], "rewards")
        for parameter, grad in true_grads.items():
            assert_same(grads[parameter], grad, parameter)


def outputs_and_grads(
    model: Any, run: Callable[[], Any], *, backward: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    with oracle.true_float64():
        found = {name: value for name, value in run()._asdict().items() if value is not None}
        if backward:
            generator = torch.Generator().manual_seed(3)
            sums = [
                (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum()
                for value in found.values()
                if value.requires_grad
            ]
            torch.stack(sums).sum().backward()
    kvpref.sum_sequence_gradients(model)
    return {name: value.detach() for name, value in found.items()}, oracle.grads_of(model)


def run_rewards(model: Any, batch: kvpref.Batch, options: dict[str, Any]) -> Any:
    """The rewards of a loss that reads them, after its backward pass."""
    seen = []

    @kvpref.loss(reads="ends")
    def squares(policy: Any, reference: Any, batch: Any) -> kvpref.LossOutput:
        seen.append(policy)
        return kvpref.LossOutput(loss=policy.rewards.square().sum(), metrics={})

    kvpref.forward_backward(model, batch, squares, **options)
    return seen[0]


def run_memory() -> None:
    """Keys and values of prefixes, and their gradients, take a share of the bytes on each rank."""
    model = kvpref.attach(MODELS["llama"]())
    prompt = tokens(240, 1)
    group = kvpref.Group([kvpref.Sequence.from_prompt_and_response(prompt, tokens(12, i)) for i in range(2, 5)])
    batch = kvpref.collate([group])
    for options in ({}, {"schedule": "bounded", "max_tokens_per_chunk": 48}):
        alone = marked_bytes(model, batch, options)
        with split(model):
            shared = marked_bytes(model, batch, options)
        assert alone["prefix K/V"] > 0
        for kind, num_bytes in alone.items():
            assert shared[kind] * distributed.get_world_size() == num_bytes, (kind, shared[kind], num_bytes)


def marked_bytes(model: Any, batch: kvpref.Batch, options: dict[str, Any]) -> dict[str, int]:
    found = dict.fromkeys(("prefix K/V", "prefix K/V gradients"), 0)

    def add(kind: str, tensors: tuple[torch.Tensor, ...]) -> None:
        if kind in found:
            found[kind] += sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    model.zero_grad(set_to_none=True)
    with observe_marks(add):
        kvpref.forward_backward(model, batch, oracle.weighted_loss, **options)
    return found


def run_wrapped() -> None:
    """Wrappers average over all ranks, of which two share each micro-batch; others have other numbers of passes."""
    group, _ = distributed.new_subgroups(2)
    world_size = distributed.get_world_size()
    shares = [make_groups(5, seed=index)[: 5 - 3 * (index % 2)] for index in range(world_size // 2)]
    own = kvpref.collate(shares[distributed.get_rank() // 2], min_shared_tokens=1)
    alone = kvpref.attach(make_model())
    for groups in shares:
        kvpref.forward_backward(alone, kvpref.collate(groups), reference_free_loss)
    expected = {name: parameter.grad / len(shares) for name, parameter in alone.named_parameters()}
    for wrap in (DistributedDataParallel, sharded):
        model = wrap(kvpref.sequence_parallel(kvpref.attach(make_model()), group))
        for options in WRAPPED:
            model.zero_grad()
            kvpref.forward_backward(
                model, own, reference_free_loss, backward=lambda loss: (2 * loss).backward(), **options
            )
            for name, parameter in unwrap(model).named_parameters():
                grad = parameter.grad
                found = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                assert_same(found, expected[name], f"{wrap.__name__} {options}: {name}")
        with pytest.raises(kvpref.InputError, match="reduces gradients over all its ranks itself"):
            kvpref.sum_sequence_gradients(model)


WRAPPED: tuple[dict[str, Any], ...] = (
    {},
    {"mode": "one_pass", "checkpoint": "all"},
    {"schedule": "bounded", "max_tokens_per_chunk": 10},
    {"schedule": "bounded", "max_tokens_per_chunk": 10, "gather_weights": "step", "reduce_grads": "step"},
)


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.base_model.h:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run_long(num_tokens: int) -> None:
    """A prompt of so many tokens, in rows whose lengths no number of ranks divides."""
    model = kvpref.attach(build_model(Qwen2Config(**_SIZES, **_HEADS, **LONG), torch.float64))
    prompt = tokens(num_tokens, 1)
    responses = [tokens(count, count) for count in (67, 5, 1)]
    batch = kvpref.collate([kvpref.Group([kvpref.Sequence.from_prompt_and_response(prompt, r) for r in responses])])
    truth = oracle.scheduled(model, batch)
    for options in ({}, {"schedule": "bounded", "max_tokens_per_chunk": num_tokens // 3, "checkpoint": "all"}):
        with split(model):
            found = oracle.scheduled(model, batch, **options)
            kvpref.sum_sequence_gradients(model)
        error, where = oracle.worst_error(found._replace(grads=oracle.grads_of(model)), truth)
        assert error < TOLERANCE, f"{num_tokens} tokens, {options}: {where} is off by {error:.1e}"


LONG: dict[str, Any] = {
    "max_position_embeddings": 10000,
    "use_sliding_window": True,
    "sliding_window": 600,
    "max_window_layers": 1,
}
"""The first layer sees everything."""


def run_refusals() -> None:
    """What cannot be split says so, on all ranks alike."""
    batch = kvpref.collate(five_levels())
    with split(kvpref.attach(MODELS["llama"]())) as model:
        with pytest.raises(kvpref.InputError, match="does not go with mode 'padded'"):
            kvpref.response_logps(model, batch, mode="padded")
        with pytest.raises(kvpref.InputError, match="does not go with router_aux_loss_coef"):
            kvpref.forward_backward(model, batch, oracle.weighted_loss, schedule="bounded", router_aux_loss_coef=0.1)
        kvpref.compile_layers(model)
        with pytest.raises(kvpref.InputError, match="does not go with compiled layers"):
            kvpref.response_logps(model, batch)
    with pytest.raises(kvpref.UnsupportedModelError, match=f"sequence_parallel {distributed.get_world_size()}"):
        kvpref.sequence_parallel(tiny_model("gemma"), distributed.group.WORLD)  # one key/value head


def assert_same(found: torch.Tensor, truth: torch.Tensor, what: str) -> None:
    error = oracle.relative_error(found, truth)
    assert error < TOLERANCE, f"{what} is off by {error:.1e}"


CHECKS: dict[str, Callable[[], None]] = {
    "cases": run_cases,
    "outputs": run_outputs,
    "memory": run_memory,
    "wrapped": run_wrapped,
    "refusals": run_refusals,
}

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    with known_families():
        for check in sys.argv[1:]:
            if check.isdecimal():
                run_long(int(check))
            else:
                CHECKS[check]()
    leave_together()
