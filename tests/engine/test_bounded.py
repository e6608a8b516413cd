"""The bounded schedule against the naive oracle: log-probs and every parameter's gradient, whatever the chunks."""

from __future__ import annotations

import functools
from typing import Any

import oracle
import pytest
import torch
from sample_groups import SCENARIOS, five_levels, pairs, story_questions_answers
from tiny_models import VARIANTS, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kvpref
from kvpref import Batch, Group
from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import score
from kvpref.models.checkpointing import CHECKPOINTS
from kvpref.tracing import observe_marks

# Only the order of additions differs; see test_exactness. Measured: 2e-15.
FP64_TOLERANCE = 1e-10
# As in test_exactness; more chunks are more additions in float32, of which there are tens here.
FP32_TOLERANCE = 1e-5

SIZES = (1, 3, 7, None)
# A chunk size of 1 makes one pass per token, which takes long where there are many.
TOKEN_BY_TOKEN = ("nested_responses", "different_scoring", "single_responses", "one_token_prompts")
CASES = [
    (name, size)
    for name in SCENARIOS
    for size in SIZES
    if (size != 1 or name in TOKEN_BY_TOKEN) and (size != 3 or name != "many_responses")
]


@functools.cache
def truth(variant: str, scenario: str) -> oracle.Result:
    return oracle.naive(tiny_model(variant, torch.float64), SCENARIOS[scenario]())


@functools.cache
def attached(variant: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return kvpref.attach(tiny_model(variant, dtype))


def collated(groups: list[Group]) -> Batch:
    return kvpref.collate(groups, min_shared_tokens=1)


def bounded(model: nn.Module, groups: list[Group], max_tokens: int | None, **options: Any) -> oracle.Result:
    return oracle.scheduled(model, collated(groups), schedule="bounded", max_tokens_per_chunk=max_tokens, **options)


@pytest.mark.parametrize(("scenario", "max_tokens"), CASES)
def test_fp64_scenarios(scenario: str, max_tokens: int | None) -> None:
    found = bounded(attached("llama"), SCENARIOS[scenario](), max_tokens)
    oracle.assert_same(found, truth("llama", scenario), FP64_TOLERANCE)


@pytest.mark.parametrize("max_tokens", [3, None])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS[1:])
@pytest.mark.parametrize("scenario", ["five_levels", "different_scoring"])
def test_fp64_checkpoints(scenario: str, checkpoint: str, max_tokens: int | None) -> None:
    found = bounded(attached("qwen3"), SCENARIOS[scenario](), max_tokens, checkpoint=checkpoint)
    oracle.assert_same(found, truth("qwen3", scenario), FP64_TOLERANCE)


@pytest.mark.parametrize("checkpoint", ["none", "all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fp64_families(variant: str, checkpoint: str) -> None:
    found = bounded(attached(variant), five_levels(), 7, checkpoint=checkpoint)
    oracle.assert_same(found, truth(variant, "five_levels"), FP64_TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_families(variant: str) -> None:
    found = bounded(attached(variant, torch.float32), story_questions_answers(), 7)
    oracle.assert_same(found, truth(variant, "story_questions_answers"), FP32_TOLERANCE)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS[1:])
@pytest.mark.parametrize("scenario", ["five_levels", "single_responses"])
def test_full_with_checkpoints(scenario: str, checkpoint: str) -> None:
    found = oracle.scheduled(attached("llama"), collated(SCENARIOS[scenario]()), checkpoint=checkpoint)
    oracle.assert_same(found, truth("llama", scenario), FP64_TOLERANCE)


@pytest.mark.parametrize("limits", [{"max_depth": 0}, {"max_depth": 1}, {"min_shared_tokens": 5}])
def test_tree_limits_do_not_change_results(limits: dict[str, int]) -> None:
    batch = kvpref.collate(five_levels(), **{"min_shared_tokens": 1, **limits})
    found = oracle.scheduled(attached("llama"), batch, schedule="bounded", max_tokens_per_chunk=4)
    oracle.assert_same(found, truth("llama", "five_levels"), FP64_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_backends(backend: str) -> None:
    found = bounded(attached("llama"), five_levels(), 4, backend=backend)
    oracle.assert_same(found, truth("llama", "five_levels"), FP64_TOLERANCE)


def test_a_model_in_eval_mode_has_the_same_gradients() -> None:
    found = bounded(kvpref.attach(tiny_model("llama", torch.float64).eval()), five_levels(), 4, checkpoint="all")
    oracle.assert_same(found, truth("llama", "five_levels"), FP64_TOLERANCE)


def test_the_models_own_checkpointing_goes_on() -> None:
    model = oracle.checkpoint_layers(kvpref.attach(tiny_model("llama", torch.float64)))
    settings = [(m.gradient_checkpointing, m._gradient_checkpointing_func) for m in model.base_model.layers]
    for checkpoint in ("none", "prefix"):
        found = bounded(model, five_levels(), 7, checkpoint=checkpoint)
        oracle.assert_same(found, truth("llama", "five_levels"), FP64_TOLERANCE)
    assert settings == [(m.gradient_checkpointing, m._gradient_checkpointing_func) for m in model.base_model.layers]


def test_checkpoint_options_leave_no_trace() -> None:
    model = kvpref.attach(tiny_model("llama", torch.float64))
    before = [dict(vars(layer)) for layer in model.base_model.layers]
    bounded(model, five_levels(), 7, checkpoint="all")
    assert [{**vars(layer)} for layer in model.base_model.layers] == before


def run_16_bit(kind: str, how: str) -> tuple[oracle.Result, oracle.Result]:
    """A run in bf16 (weights, or autocast over float32 weights) and its float64 truth."""
    model = tiny_model("llama", torch.bfloat16 if kind == "weights" else torch.float32)
    groups = five_levels() + pairs()
    exact = oracle.naive(oracle.twin(model, torch.float64), groups)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        if how == "naive":
            return oracle.naive(model, groups), exact
        options = {"schedule": "bounded", "max_tokens_per_chunk": 5} if how == "bounded" else {}
        return oracle.scheduled(kvpref.attach(model), collated(groups), **options), exact


@pytest.mark.parametrize(("kind", "other"), [("weights", "naive"), ("autocast", "naive"), ("autocast", "full")])
def test_16_bit_is_no_worse(kind: str, other: str) -> None:
    """float64 judges both runs; see test_exactness for the factor.

    Under autocast one context is wrapped around the whole call, forwards without and with gradient, where a cache of
    cast weights without a graph would cost weights their gradient.
    """
    (found, exact), (baseline, _) = run_16_bit(kind, "bounded"), run_16_bit(kind, other)
    for name, tensor in [("token_logps", exact.token_logps), *exact.grads.items()]:
        if tensor.ndim > 1 or name == "token_logps":
            error, base = (
                oracle.relative_error(run.token_logps if name == "token_logps" else run.grads[name], tensor)
                for run in (found, baseline)
            )
            assert error <= 2 * base, name


def test_16_bit_models_sum_the_gradients_of_prefixes_in_fp32() -> None:
    """Many responses add to the gradient of one prompt; bf16 sums would lose what each of them adds."""
    seen: set[tuple[str, torch.dtype]] = set()
    with observe_marks(lambda kind, tensors: seen.update((kind, tensor.dtype) for tensor in tensors)):
        bounded(attached("llama", torch.bfloat16), pairs(), 7)
    assert seen == {
        ("prefix K/V", torch.bfloat16),
        ("prefix K/V gradients", torch.float32),
        ("log-probs", torch.float32),
        ("gradients", torch.bfloat16),
    }


def test_gradients_accumulate_over_calls() -> None:
    model, batch = attached("llama"), collated(pairs())
    once = oracle.scheduled(model, batch, schedule="bounded", max_tokens_per_chunk=4)
    with oracle.true_float64():
        kvpref.forward_backward(model, batch, oracle.weighted_loss, schedule="bounded", max_tokens_per_chunk=4)
    twice = oracle.Result(once.token_logps, {name: 2 * grad for name, grad in once.grads.items()})
    oracle.assert_same(oracle.Result(once.token_logps, oracle.grads_of(model)), twice, FP64_TOLERANCE)


@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_backward_may_scale_the_loss(schedule: str) -> None:
    """As accelerate does: what reaches the log-probs is carried on, here a power of two, so exactly."""
    options = {"schedule": schedule, "max_tokens_per_chunk": 4 if schedule == "bounded" else None}
    model, batch = attached("llama", torch.float32), collated(five_levels())
    plain = oracle.scheduled(model, batch, **options)
    scaled = oracle.scheduled(model, batch, backward=lambda loss: (loss * 2**10).backward(), **options)
    for name, grad in plain.grads.items():
        assert torch.equal(scaled.grads[name], grad * 2**10), name


def test_with_torchs_gradient_scaler() -> None:
    model, batch = kvpref.attach(tiny_model("llama")), collated(five_levels())
    options: dict[str, Any] = {"schedule": "bounded", "max_tokens_per_chunk": 4}
    plain = oracle.scheduled(model, batch, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    oracle.scheduled(model, batch, backward=lambda loss: scaler.scale(loss).backward(), **options)
    scaler.unscale_(optimizer)
    for name, grad in oracle.grads_of(model).items():
        assert torch.equal(grad, plain.grads[name]), name


def test_scoring_in_chunks() -> None:
    for max_tokens in (4, None):
        with oracle.true_float64():
            options = EngineOptions(schedule="bounded", max_tokens_per_chunk=max_tokens)
            found = score(attached("llama"), collated(five_levels()), options)
        assert not found.token_logps.requires_grad
        assert oracle.relative_error(found.token_logps, truth("llama", "five_levels").token_logps) < FP64_TOLERANCE
        assert found.cu_seqlens.tolist() == collated(five_levels()).cu_seqlens.tolist()


@pytest.mark.parametrize("listener", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_vocabulary_weights_see_their_gradients(listener: str) -> None:
    """In-place gradients would pass them by."""
    model = kvpref.attach(tiny_model("llama:tied", torch.float64))
    weight = model.get_input_embeddings().weight
    seen: list[torch.Tensor] = []
    getattr(weight, listener)(seen.append)
    found = bounded(model, pairs(), 7)
    assert seen
    oracle.assert_same(found, truth("llama:tied", "pairs"), FP64_TOLERANCE)


def test_gradients_of_the_vocabulary_never_pass_through_autograd() -> None:
    """A tensor as large as the vocabulary per chunk would outweigh what the chunk saves."""
    model = kvpref.attach(tiny_model("llama:tied"))
    weight = model.get_input_embeddings().weight
    weight.grad = torch.zeros_like(weight)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                is_new = isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known
                largest = max(largest, tensor.numel() if is_new else 0)
            return result

    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), weight.grad)}
    batch = collated(pairs())
    with Watch():
        kvpref.forward_backward(
            model,
            batch,
            lambda policy, reference, _: kvpref.LossOutput(policy.token_logps.sum(), {}),
            schedule="bounded",
            max_tokens_per_chunk=2,
        )
    assert 0 < largest < weight.numel()
