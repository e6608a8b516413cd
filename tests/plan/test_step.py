"""Steps: what several micro-batches share is planned once, and each keeps the way to its own log-probs."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from sample_groups import SCENARIOS, five_levels, shared_system_prompt, tokens

import kvpref
from kvpref import Batch, Group, Sequence
from kvpref.plan.chunks import ChunkPlan
from kvpref.plan.step import Step, join_batches
from kvpref.records.tensor_fields import STAYS_ON_THE_HOST


def micro_batches(groups: list[Group], **options: Any) -> list[Batch]:
    """One per group."""
    return [kvpref.collate([group], **{"min_shared_tokens": 1, **options}) for group in groups]


def all_chunks(step: Step) -> list[ChunkPlan]:
    return [*step.chunks.shared, *(chunk for part in step.chunks.micro_batches for chunk in part.chunks)]


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value) if field.metadata != STAYS_ON_THE_HOST]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


@pytest.mark.parametrize("max_tokens", [1, 4, None])
@pytest.mark.parametrize("scenario", ["five_levels", "shared_system_prompt", "nothing_shared", "identical_responses"])
def test_every_unique_token_of_the_step_runs_once(scenario: str, max_tokens: int | None) -> None:
    groups = SCENARIOS[scenario]()
    step = join_batches(micro_batches(groups), max_tokens_per_chunk=max_tokens)
    unique = {s.input_ids[: i + 1] for group in groups for s in group.sequences for i in range(len(s))}
    assert sum(chunk.num_tokens for chunk in all_chunks(step)) == len(unique)
    # A prefix of several micro-batches runs before them all.
    readers: dict[tuple[int, ...], set[int]] = {}
    for index, group in enumerate(groups):
        for sequence in group.sequences:
            for stop in range(1, len(sequence) + 1):
                readers.setdefault(sequence.input_ids[:stop], set()).add(index)
    assert sum(chunk.num_tokens for chunk in step.chunks.shared) == sum(len(who) > 1 for who in readers.values())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_micro_batch_finds_the_targets_of_its_sequences(scenario: str) -> None:
    step = join_batches(micro_batches(SCENARIOS[scenario]()), max_tokens_per_chunk=3)
    targets = torch.full((step.chunks.num_logps,), -1)
    for chunk in all_chunks(step):
        targets[chunk.logp_index] = chunk.targets
    assert (targets >= 0).all()
    for batch, part in zip(step.batches, step.chunks.micro_batches, strict=True):
        scored = [[t for t, flag in zip(s.input_ids, s.scored, strict=True) if flag] for s in batch.sequences]
        assert targets[part.token_index].tolist() == [token for tokens_of_one in scored for token in tokens_of_one]
        assert part.cu_seqlens.diff().tolist() == list(map(len, scored))
        assert part.cu_seqlens[0] == 0


def test_one_batch_keeps_its_tree() -> None:
    """A batch that was collated to share little is not shared more."""
    batch = kvpref.collate(five_levels(), min_shared_tokens=1, max_depth=0)
    step = join_batches([batch], max_tokens_per_chunk=None)
    assert sum(chunk.num_tokens for chunk in all_chunks(step)) == batch.num_unique_tokens
    assert not step.chunks.shared


def test_joining_shares_as_the_batches_do() -> None:
    groups = shared_system_prompt()  # 8 tokens in common
    for limit, is_shared in ((8, True), (9, False)):
        step = join_batches(micro_batches(groups, min_shared_tokens=limit), max_tokens_per_chunk=None)
        assert bool(step.chunks.shared) == is_shared


def test_prompts_get_chunks_of_their_own_only_where_they_get_no_gradient() -> None:
    prompt = tokens(6, 1)
    group = Group([Sequence.from_prompt_and_response(prompt, [3 + i, *tokens(4, 2 + i)]) for i in range(2)])
    for prefix_grad in (True, False):
        step = join_batches(micro_batches([group]), max_tokens_per_chunk=None, prefix_grad=prefix_grad)
        assert [chunk.is_prompt for chunk in all_chunks(step)] == [not prefix_grad, False]


def test_to_moves_every_tensor() -> None:
    batches = [kvpref.collate([group], min_shared_tokens=1, modes=("packed",)) for group in five_levels()]
    step = join_batches(batches, max_tokens_per_chunk=3)
    moved = step.to("meta")
    assert {tensor.device.type for tensor in tensors_of(step.chunks)} == {"cpu"}
    found = [*tensors_of(moved.chunks), *(batch.group_index for batch in moved.batches)]
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert {batch.device.type for batch in moved.batches} == {"meta"}
    assert len(tensors_of(moved.chunks)) == len(tensors_of(step.chunks))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one micro-batch"):
        join_batches([], max_tokens_per_chunk=None)
    with pytest.raises(ValueError, match="max_tokens_per_chunk must be at least 1; got 0"):
        join_batches(micro_batches(five_levels()), max_tokens_per_chunk=0)


def test_batches_that_differ_in_sharing_are_refused() -> None:
    group = five_levels()[0]
    batches = [kvpref.collate([group], min_shared_tokens=limit) for limit in (1, 16)]
    with pytest.raises(ValueError, match="same limits"):
        join_batches(batches, max_tokens_per_chunk=None)


def test_occurrences_are_asked_for_only_where_they_were_counted() -> None:
    batch = kvpref.collate(SCENARIOS["pairs"](), min_shared_tokens=1)
    counted, bare = (
        kvpref.join_batches([batch], max_tokens_per_chunk=5, counts_occurrences=counts) for counts in (True, False)
    )
    assert sum(sum(chunk.occurrences.lengths) for chunk in counted.chunks.all) == batch.num_unique_tokens
    with pytest.raises(ValueError, match="counts_occurrences=False; join it again"):
        _ = bare.chunks.all[0].occurrences
