"""Several micro-batches in one step, and what runs how often: tokens and layers are counted."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from sample_groups import five_levels, nothing_shared, pairs, shared_system_prompt, tokens
from tiny_models import tiny_model
from torch import nn

import kvpref
from kvpref import Batch, Group, LossOutput, ResponseLogps, Sequence
from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import forward_backward_step
from kvpref.plan.step import join_batches
from kvpref.tracing import current_region

# Only the order of additions differs; see test_exactness.
FP64_TOLERANCE = 1e-10


def few_shot() -> list[Group]:
    """One long few-shot prefix; some prompts behind it are nested, one response is given twice."""
    examples, question = tokens(17, 200), tokens(5, 201)
    prompts = [examples + question, examples + question + tokens(3, 202), examples + tokens(4, 203), examples]
    again = tokens(3, 204)
    return [
        Group(
            [Sequence.from_prompt_and_response(prompt, r) for r in (tokens(2 + i, 210 + i), [4, *tokens(3, i)], again)]
        )
        for i, prompt in enumerate(prompts)
    ]


def repeated() -> list[Group]:
    """A micro-batch that comes twice: even its leaves are shared."""
    return [pairs()[0], pairs()[0], pairs()[1]]


STEPS = {
    builder.__name__: builder for builder in (few_shot, five_levels, nothing_shared, shared_system_prompt, repeated)
}


@functools.cache
def model() -> nn.Module:
    return kvpref.attach(tiny_model("llama", torch.float64))


def coupled(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    sums = policy.sum()
    if reference is not None:
        sums = sums - reference.sum()
    return LossOutput(((0.1 * sums).softmax(0) * sums).sum(), {"num": torch.tensor(float(len(sums)))})


def micro_batches(groups: list[Group]) -> list[Batch]:
    return [kvpref.collate([group], min_shared_tokens=1) for group in groups]


def made_reference(batch: Batch) -> ResponseLogps:
    logps = -torch.rand(batch.num_scored_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 9
    return ResponseLogps(token_logps=logps, cu_seqlens=batch.cu_seqlens, group_index=batch.group_index)


def one_call_each(batches: list[Batch]) -> tuple[list[LossOutput], oracle.Result]:
    """Micro-batch after micro-batch in schedule `full`; micro-batch i counts i + 1 times."""
    model().zero_grad(set_to_none=True)
    outputs = []
    with oracle.true_float64():
        for index, batch in enumerate(batches):
            scale = float(index + 1)
            outputs.append(
                kvpref.forward_backward(
                    model(),
                    batch,
                    coupled,
                    reference=made_reference(batch) if index else None,
                    backward=lambda loss, scale=scale: (loss * scale).backward(),
                )
            )
    return outputs, oracle.Result(torch.stack([output.loss for output in outputs]), oracle.grads_of(model()))


@pytest.mark.parametrize("max_tokens", [4, None])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_equals_its_micro_batches_one_by_one(name: str, max_tokens: int | None) -> None:
    batches = micro_batches(STEPS[name]())
    expected, truth = one_call_each(batches)
    options = EngineOptions(schedule="bounded", max_tokens_per_chunk=max_tokens)
    model().zero_grad(set_to_none=True)
    with oracle.true_float64():
        outputs = forward_backward_step(
            model(),
            join_batches(batches, max_tokens_per_chunk=options.chunk_tokens),
            coupled,
            options,
            references=[made_reference(batch) if index else None for index, batch in enumerate(batches)],
            backward=lambda loss, index: (loss * (index + 1)).backward(),
        )
    found = oracle.Result(torch.stack([output.loss for output in outputs]), oracle.grads_of(model()))
    oracle.assert_same(found, truth, FP64_TOLERANCE)
    assert [output.metrics["num"] for output in outputs] == [output.metrics["num"] for output in expected]


@contextmanager
def counting(module: nn.Module) -> Iterator[Counter[str]]:
    """Tokens that a module takes in, by engine region (``pass 1``, ``recompute pass 0``)."""
    counts: Counter[str] = Counter()

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        kind = "with graph" if torch.is_grad_enabled() else "without"
        counts[f"{current_region()}, {kind}"] += hidden.shape[1]

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def run_step(batches: list[Batch], max_tokens: int, **options: Any) -> Counter[str]:
    """The tokens that pass through the first layer."""
    settings = EngineOptions(schedule="bounded", max_tokens_per_chunk=max_tokens, **options)
    step = join_batches(batches, max_tokens_per_chunk=max_tokens, prefix_grad=settings.prefix_grad)
    with counting(model().base_model.layers[0].mlp) as counts:
        forward_backward_step(
            model(), step, coupled, settings, references=[None] * len(batches), backward=lambda loss, _: loss.backward()
        )
    return counts


def prompt_of_two(num_prompt: int, num_response: int, seed: int = 0) -> Group:
    prompt = tokens(num_prompt, 50)
    responses = [[3 + 2 * seed + i, *tokens(num_response - 1, 60 + 2 * seed + i)] for i in range(2)]
    return Group([Sequence.from_prompt_and_response(prompt, response) for response in responses])


def test_a_shared_prompt_runs_forward_once_and_once_more_for_its_backward() -> None:
    """Three micro-batches behind one prompt of 20 tokens, two responses of 6 each, 12 tokens per chunk."""
    counts = run_step(micro_batches([prompt_of_two(20, 6, seed) for seed in range(3)]), max_tokens=12)
    assert counts == {
        "pass 0, without": 20,
        "recompute pass 0, with graph": 20,
        # Both responses fit in one chunk, whose graph is kept.
        "pass 1, with graph": 3 * 12,
    }


def test_the_last_chunks_within_the_bound_keep_their_graphs() -> None:
    """A prompt of 8 tokens and eight responses of 4 in chunks of 8: only the last chunk does not run twice."""
    responses = [[3 + i, *tokens(3, 60 + i)] for i in range(8)]
    group = Group([Sequence.from_prompt_and_response(tokens(8, 50), response) for response in responses])
    assert run_step(micro_batches([group]), max_tokens=8) == {
        "pass 0, without": 8,
        "pass 1, without": 24,
        "pass 1, with graph": 8,
        "recompute pass 1, with graph": 24,
        "recompute pass 0, with graph": 8,
    }


def test_within_the_bound_nothing_runs_twice() -> None:
    assert run_step(micro_batches([prompt_of_two(8, 4)]), max_tokens=16) == {
        "pass 0, with graph": 8,
        "pass 1, with graph": 8,
    }


def test_constant_prompts_never_run_with_a_graph() -> None:
    counts = run_step(micro_batches([prompt_of_two(20, 6, seed) for seed in range(2)]), 12, prefix_grad=False)
    assert counts == {"pass 0, without": 20, "pass 1, with graph": 2 * 12}


@pytest.mark.parametrize(
    ("checkpoint", "recomputed"),
    [("none", {}), ("prefix", {"backward pass 0": 8}), ("all", {"backward pass 0": 8, "backward pass 1": 8})],
)
def test_checkpoints_compute_the_named_passes_again(checkpoint: str, recomputed: dict[str, int]) -> None:
    counts = run_step(micro_batches([prompt_of_two(8, 4)]), max_tokens=16, checkpoint=checkpoint)
    expected = {"pass 0, with graph": 8, "pass 1, with graph": 8}
    assert counts == {**expected, **{f"{name}, with graph": num for name, num in recomputed.items()}}


@pytest.mark.parametrize(("checkpoint", "num_tokens"), [("none", 0), ("prefix", 8), ("all", 16)])
def test_checkpoints_in_schedule_full(checkpoint: str, num_tokens: int) -> None:
    batch = kvpref.collate([prompt_of_two(8, 4)], min_shared_tokens=1)
    with counting(model().base_model.layers[0].mlp) as counts:
        kvpref.forward_backward(model(), batch, coupled, checkpoint=checkpoint)
    assert counts["backward, with graph"] == num_tokens
    assert counts.total() == 16 + num_tokens


def test_checkpointed_passes_keep_less() -> None:
    """Bytes that autograd saves outside recomputation, from most to least."""

    def saved_bytes(checkpoint: str) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        batch = kvpref.collate([prompt_of_two(30, 12)], min_shared_tokens=1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kvpref.forward_backward(model(), batch, coupled, schedule="bounded", checkpoint=checkpoint)
        return sum(storage.nbytes() for storage in storages.values())

    none, prefix, everything = map(saved_bytes, ("none", "prefix", "all"))
    assert everything < prefix < none
