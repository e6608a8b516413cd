"""Collating groups, and the sums and means of what comes back."""

from __future__ import annotations

import pytest
import torch
from sample_groups import SCENARIOS, pairs, tokens

import kvpref
from kvpref import Batch, Group, ResponseLogps, Sequence
from kvpref.records.tensor_fields import map_tensors


def test_counts() -> None:
    groups = pairs()
    batch = kvpref.collate(groups, min_shared_tokens=1)
    assert isinstance(batch, Batch)
    assert batch.num_groups == 3
    assert batch.num_sequences == 8
    assert batch.sequences == tuple(sequence for group in groups for sequence in group.sequences)
    assert batch.num_total_tokens == sum(len(sequence) for sequence in batch.sequences)
    assert batch.num_unique_tokens == 7 + 5 + 3 + 11 + 2 + 6 + 4 + 1 + 3 + 4 + 4
    assert batch.num_scored_tokens == 5 + 3 + 2 + 6 + 4 + 1 + 4 + 4
    assert batch.group_index.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_sharing_never_stores_more_than_repeating(scenario: str) -> None:
    groups = SCENARIOS[scenario]()
    shared, limited = kvpref.collate(groups, min_shared_tokens=1), kvpref.collate(groups)
    assert shared.num_unique_tokens <= limited.num_unique_tokens <= shared.num_total_tokens


def test_short_shared_runs_are_repeated_by_default() -> None:
    def num_levels(num_shared: int) -> int:
        prompt = tokens(num_shared, 1)
        group = Group([Sequence.from_prompt_and_response(prompt, [3 + i]) for i in range(2)])
        return kvpref.collate([group]).tree.num_levels

    assert num_levels(15) == 1
    assert num_levels(16) == 2


def test_max_depth() -> None:
    groups = SCENARIOS["five_levels"]()
    for depth in range(3):
        assert kvpref.collate(groups, min_shared_tokens=1, max_depth=depth).tree.num_levels == depth + 1
    assert kvpref.collate(groups, min_shared_tokens=1).tree.num_levels == 3


def test_a_level_more_has_to_save_enough() -> None:
    groups = SCENARIOS["five_levels"]()
    levels = [kvpref.collate(groups, min_shared_tokens=1, pass_tokens=tokens).tree.num_levels for tokens in (0, 50)]
    assert levels == [3, 2]


def test_plans_are_built_once_and_ahead_of_time_where_asked() -> None:
    batch = kvpref.collate(pairs(), modes=["two_pass", "padded"])
    assert batch.plan("two_pass") is batch.plan("two_pass")
    with pytest.raises(ValueError, match="'nope'"):
        kvpref.collate(pairs(), modes=["nope"])
    with pytest.raises(ValueError, match="'nope'"):
        batch.plan("nope")


def test_moving_a_batch_keeps_the_old_one() -> None:
    batch = kvpref.collate(pairs(), modes=["two_pass"])
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert moved.device.type == "meta"
    assert moved.group_index.device.type == "meta"
    assert moved.plan("two_pass").targets.device.type == "meta"
    assert moved.plan("packed").targets.device.type == "meta"
    assert batch.plan("two_pass").targets.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": []}, "at least one group"),
        ({"groups": pairs(), "min_shared_tokens": 0}, "min_shared_tokens"),
        ({"groups": pairs(), "max_depth": -1}, "max_depth"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kvpref.collate(**arguments)  # type: ignore[arg-type]


def response_logps(values: list[float], lengths: list[int]) -> ResponseLogps:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    token_logps = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    return ResponseLogps(token_logps, offsets, torch.arange(len(lengths)))


def test_sums_and_means_with_a_sequence_that_scores_nothing() -> None:
    logps = response_logps([1.0, 2.0, 4.0, 8.0, 16.0], [2, 0, 3])
    assert logps.lengths().tolist() == [2, 0, 3]
    assert logps.sum().tolist() == [3.0, 0.0, 28.0]
    assert logps.mean().tolist() == [1.5, 0.0, 28.0 / 3]


def test_gradients_of_sums_and_means() -> None:
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    logps = response_logps([1.0, 2.0, 4.0, 8.0, 16.0], [2, 0, 3])
    (grad,) = torch.autograd.grad((logps.sum() * weights).sum(), logps.token_logps)
    assert grad.tolist() == [1.0, 1.0, 100.0, 100.0, 100.0]
    (grad,) = torch.autograd.grad((logps.mean() * weights).sum(), logps.token_logps)
    assert grad.tolist() == [0.5, 0.5, 100 / 3, 100 / 3, 100 / 3]


def test_nothing_scored_at_all() -> None:
    logps = response_logps([], [0, 0])
    assert logps.sum().tolist() == [0.0, 0.0]
    assert logps.mean().tolist() == [0.0, 0.0]
    logps.sum().sum().backward()


def test_response_logps_is_a_tuple_of_tensors() -> None:
    """Distributed wrappers search a forward's output for tensors, and find them in tuples."""
    logps = response_logps([1.0], [1])
    assert isinstance(logps, tuple)
    assert all(isinstance(item, torch.Tensor) for item in logps[:3])
    assert all(item is None for item in logps[3:]), "what was not asked for is not there"


@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed", "padded"])
def test_pinning_covers_every_tensor_and_changes_none(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Page-locked memory needs a CUDA driver; a copy stands in for it, and shows which tensors were asked for.
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    batch = kvpref.collate(pairs(), modes=(mode,), min_shared_tokens=1)
    pinned = batch.pin_memory()
    before, after = [tensors_of(item) for item in (batch, pinned)]
    assert len(before) == len(after) > 5
    assert all(torch.equal(old, new) and old is not new for old, new in zip(before, after, strict=True))
    assert pinned.groups == batch.groups
    assert pinned.tree is batch.tree


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    found = [batch.group_index]
    for plan in batch._plans.values():
        map_tensors(plan, lambda tensor: found.append(tensor) or tensor)
    return found


def test_weighted_sums_and_means() -> None:
    """The last sequence has weights of 0 alone: nothing counts, and nothing is divided by 0."""
    weights = torch.tensor([0.5, 2.0, 0.0, 0.25, 0.0, 0.0], dtype=torch.float64)
    logps = response_logps([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [2, 0, 2, 2])._replace(weights=weights)
    assert logps.total_weights().tolist() == [2.5, 0, 0.25, 0]
    assert logps.sum().tolist() == [4.5, 0.0, 2.0, 0.0]
    assert logps.mean().tolist() == [4.5 / 2.5, 0.0, 8.0, 0.0]
    assert logps.weighted(torch.ones(6)).tolist() == weights.tolist()
    (grad,) = torch.autograd.grad(logps.mean().sum(), logps.token_logps)
    assert grad.tolist() == [0.2, 0.8, 0.0, 1.0, 0.0, 0.0]
