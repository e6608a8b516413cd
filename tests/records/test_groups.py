"""`Sequence` and `Group` refuse what would give wrong results later."""

from __future__ import annotations

import dataclasses

import pytest

from kvpref import Group, Sequence


def test_from_prompt_and_response_scores_exactly_the_response() -> None:
    sequence = Sequence.from_prompt_and_response([5, 6, 7], [8, 9])
    assert sequence.input_ids == (5, 6, 7, 8, 9)
    assert sequence.scored == (False, False, False, True, True)
    assert len(sequence) == 5


def test_records_are_immutable_hashable_and_comparable() -> None:
    sequence = Sequence([5, 6], [False, True])
    assert sequence == Sequence((5, 6), (False, True))
    assert len({sequence, Sequence((5, 6), (False, True))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        sequence.input_ids = (1,)  # type: ignore[misc]
    group = Group([sequence])
    with pytest.raises(dataclasses.FrozenInstanceError):
        group.id = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("input_ids", "scored", "message"),
    [
        ([], [], "at least one token"),
        ([5, 6], [False], "got 2 and 1"),
        ([5, 6], [True, True], "first token"),
    ],
)
def test_bad_sequences(input_ids: list[int], scored: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequence(input_ids, scored)


def test_an_empty_prompt_asks_for_a_bos_token() -> None:
    with pytest.raises(ValueError, match="BOS"):
        Sequence.from_prompt_and_response([], [8, 9])


def test_bad_groups_are_named_by_their_id() -> None:
    sequence = Sequence([5, 6], [False, True])
    with pytest.raises(ValueError, match=r"'data\.jsonl:3' has no sequences"):
        Group([], id="data.jsonl:3")
    with pytest.raises(ValueError, match=r"'data\.jsonl:3': scores .* got 1 for 2 sequences"):
        Group([sequence, sequence], scores=[1.0], id="data.jsonl:3")
    with pytest.raises(ValueError, match="labels"):
        Group([sequence], labels=[True, False])


def test_group_keeps_what_it_is_given() -> None:
    sequences = [Sequence([5, 6], [False, True]), Sequence([5, 7], [False, True])]
    group = Group(sequences, scores=[1.0, None], labels=[True, False], id="x")
    assert group.sequences == tuple(sequences)
    assert group.scores == (1.0, None)
    assert group.labels == (True, False)
    assert len(group) == 2


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_weights_that_are_no_weights(weight: float) -> None:
    with pytest.raises(ValueError, match=f"weights must be finite numbers of at least 0; got {weight}"):
        Sequence([1, 2, 3], [False, True, True], weights=[1.0, weight])
