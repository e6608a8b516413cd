"""Columns as numbers: per sequence, per turn, per scored token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import kvpref
from kvpref import Group, Sequence
from kvpref.plan.columns import exact_token_numbers, spread_numbers, turn_lengths, turn_numbers


def turns(*lengths: int, **more: Any) -> Sequence:
    """A prompt token, then turns of these lengths, each followed by a token that is not scored."""
    scored = [False, *(flag for length in lengths for flag in [True] * length + [False])]
    return Sequence(range(1, 1 + len(scored)), scored, **more)


def rewritten() -> Sequence:
    """Three turns, the first of which is scored in a sequence of its own."""
    return turns(3, 1, earlier=[turns(2)])


def group(**columns: Any) -> Group:
    return Group([turns(2, 3), rewritten()], id="file:1", columns=columns)


def test_a_turns_number_is_that_of_each_of_its_tokens() -> None:
    by_turn = kvpref.collate([group(gain=[[0.5, -1], (1.0, 2.0, 3.0)])])
    by_token = kvpref.collate([group(gain=[[0.5, 0.5, -1, -1, -1], [1.0, 1.0, 2.0, 2.0, 2.0, 3.0]])])
    mixed = kvpref.collate([group(gain=[[0.5, -1], np.array([1.0, 1.0, 2.0, 2.0, 2.0, 3.0])])])
    expected = torch.tensor([0.5, 0.5, -1, -1, -1, 1, 1, 2, 2, 2, 3])
    for batch in (by_turn, by_token, mixed):
        assert torch.equal(batch.token_column("gain"), expected)


def test_where_every_turn_is_one_token_both_are_the_same() -> None:
    batch = kvpref.collate([Group([turns(1, 1, 1)], columns={"gain": [[1.0, 2.0, 3.0]]})])
    assert batch.token_column("gain").tolist() == [1, 2, 3]
    assert exact_token_numbers(batch.groups, "gain").tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ([1.0, 2.0, 3.0], "3"),
        ([], "0"),
        ([1.0, None], "None"),
        (["1", "2"], "'1'"),
        ([[1.0], [2.0, 3.0]], r"\[1.0\]"),
        ([[1.0], [2.0]], r"\[1.0\]"),
        (0.5, "0.5"),
        ("ab", "ab"),
    ],
)
def test_anything_else_is_refused_with_both_lengths(entry: object, found: str) -> None:
    groups = [group(gain=[[0.5, -1], [1.0, 2.0, 3.0]]), group(gain=[entry, [1.0, 2.0, 3.0]])]
    wanted = r"one number per scored token \(5\), or one per turn \(2\), of response 0"
    with pytest.raises(kvpref.InputError, match=f"file:1: column 'gain' must hold {wanted}; found {found}$"):
        kvpref.collate(groups).token_column("gain")


def test_what_cannot_be_per_turn_is_refused() -> None:
    """Log-probs, which belong to single tokens."""
    with pytest.raises(kvpref.InputError, match=r"one number per scored token \(6\) of response 1; found 3$"):
        exact_token_numbers([group(old=[[-1.0] * 5, [-1.0] * 3])], "old")


def test_a_number_of_a_response_is_that_of_its_tokens() -> None:
    found = spread_numbers([group(gain=[2, [1.0, 2.0, 3.0]]), group(gain=0.25)], "gain")
    assert found.tolist() == [2.0] * 5 + [1, 1, 2, 2, 2, 3] + [0.25] * 11


def test_numbers_by_turn() -> None:
    (found,) = turn_numbers([group(turn_scores=[[1, 0.5], None])], "turn_scores")
    assert found[0] is not None
    assert (found[0].tolist(), found[1]) == ([1.0, 0.5], None)
    assert turn_lengths(rewritten()).tolist() == [2, 3, 1]
    with pytest.raises(kvpref.InputError, match=r"one number per turn \(3\) of response 1; found 6$"):
        turn_numbers([group(turn_scores=[[1, 0.5], [1.0] * 6])], "turn_scores")
    with pytest.raises(kvpref.InputError, match="file:1: no column 'turn_scores'; this group's extra columns: none"):
        turn_numbers([group()], "turn_scores")


def test_weights_of_all_parts_stand_in_the_order_of_the_tokens() -> None:
    plain, heavy = turns(2, 1), turns(1, 1, weights=[0.5, 2.0], earlier=[turns(2), turns(1, weights=[3.0])])
    batch = kvpref.collate([Group([plain]), Group([heavy])])
    weights = batch.token_weights(torch.float64)
    assert weights is not None
    assert weights.tolist() == [1, 1, 1, 1, 1, 3, 0.5, 2]
    assert len(weights) == int(batch.cu_seqlens[-1])
    assert kvpref.collate([Group([plain])]).token_weights(torch.float64) is None


def test_weights_are_made_when_collated_and_travel_with_the_batch() -> None:
    batch = kvpref.collate([Group([turns(2, weights=[0.1, 0.2])])])
    (made,) = batch._made
    moved = batch.to("meta").token_weights(torch.float32)
    assert moved is not None
    assert (moved.device.type, moved.dtype, len(batch._made)) == ("meta", torch.float32, 1)
    assert torch.equal(made[1], torch.tensor([0.1, 0.2], dtype=torch.float64))
