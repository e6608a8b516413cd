"""Ranks say only which response is better: losses that read more than that refuse them, all others take them."""

from __future__ import annotations

import pickle

import pytest
import torch
from scored_groups import random_logps

import kvpref
from kvpref import Group, Sequence
from kvpref.data import PreferenceDataset
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss, make_loss
from kvpref.losses.mismatched import add_mismatched
from kvpref.losses.registry import OBJECTIVES
from kvpref.training.loading.selection import select_groups

READ_SCORES = {"kto", "apo_zero_unpaired", "lipo", "reward_regression", "weighted_sft"}
SEQUENCES = [Sequence.from_prompt_and_response([1, 2], [3, 4]), Sequence.from_prompt_and_response([1, 2], [5])]
OTHER = [Sequence.from_prompt_and_response([1, 6], [7]), Sequence.from_prompt_and_response([1, 6], [8, 9, 10])]


def ranked() -> list[Group]:
    return [Group(SEQUENCES, ranks=[1, 2], id="file:1"), Group(OTHER, ranks=[2, 1], id="file:2")]


def scored(shift: float) -> list[Group]:
    """The same order as scores, from another zero."""
    return [Group(group.sequences, scores=[score + shift for score in group.scores or ()]) for group in ranked()]


def value(loss: PreferenceLoss, groups: list[Group]) -> float:
    batch = kvpref.collate(groups)
    if loss.reads == "ends":
        rewards = torch.tensor([0.3, -0.2, 1.1, 0.4], dtype=torch.float64, requires_grad=True)
        return loss(kvpref.ResponseRewards(rewards, batch.group_index), None, batch).loss.item()  # type: ignore[arg-type]
    return loss(random_logps(batch, 1), random_logps(batch, 4) if loss.needs_reference else None, batch).loss.item()


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - READ_SCORES))
def test_a_loss_that_takes_ranks_reads_nothing_but_differences(name: str) -> None:
    loss = make_loss(name)
    expected = value(loss, scored(7.0))
    assert value(loss, ranked()) == pytest.approx(expected, rel=1e-12)
    assert [len(group) for group in select_groups(ranked(), loss)] == [
        len(group) for group in select_groups(scored(7.0), loss)
    ]


@pytest.mark.parametrize("name", sorted(READ_SCORES))
def test_a_loss_that_reads_scores_refuses_ranks_before_training_and_in_itself(name: str) -> None:
    loss = make_loss(name)
    message = f"file:1: {name}.*ranks say only which one is better; give `scores`"
    with pytest.raises(InputError, match=message):
        select_groups(ranked(), loss)
    with pytest.raises(InputError, match=message):
        value(loss, list(add_mismatched(ranked(), 1)) if name == "kto" else ranked())
    mixture = make_loss("mixture", weights={name: 1.0})
    with pytest.raises(InputError, match=message):
        select_groups(ranked(), mixture)


def test_scores_that_count_from_another_zero_matter_to_those_losses() -> None:
    for name in sorted(READ_SCORES - {"kto"}):
        assert value(make_loss(name), scored(2.5)) != pytest.approx(value(make_loss(name), scored(9.5)), rel=1e-3)


def test_a_mixture_of_a_part_that_compares_and_one_that_reads_scores_refuses_ranks() -> None:
    mixture = make_loss("mixture", weights={"all_pairs": 1.0, "weighted_sft": 0.5})
    with pytest.raises(InputError, match="file:1: weighted_sft"):
        select_groups(ranked(), mixture)
    assert len(select_groups(ranked(), make_loss("mpo"))) == 2


def test_softmax_weights_compare() -> None:
    loss = make_loss("weighted_sft", weights="softmax")
    assert value(loss, ranked()) == pytest.approx(value(loss, scored(7.0)), rel=1e-12)


def test_labels_beside_ranks_are_what_counts() -> None:
    labelled = [Group(SEQUENCES, ranks=[1, 2], labels=[True, False])]
    assert value(make_loss("apo_zero_unpaired"), labelled) == value(
        make_loss("apo_zero_unpaired"), [Group(SEQUENCES, labels=[True, False])]
    )


def test_a_group_without_any_rating_is_refused_before_training() -> None:
    with pytest.raises(InputError, match="file:9: response 0 has neither a label nor a score"):
        select_groups([Group(SEQUENCES, id="file:9")], make_loss("apo_zero_unpaired"))


def test_ranks_are_kept_wherever_groups_go() -> None:
    group = Group(SEQUENCES, ranks=[2, None], id="a")
    assert (group.ranks, group.scores) == ((2, None), (-2.0, None))
    assert (group.take([1]).ranks, group.take([1]).scores) == ((None,), (None,))
    dataset = PreferenceDataset([group, Group(SEQUENCES, scores=[1.0, 2.0])])
    for stored in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert stored[0] == group
        assert stored[1].ranks is None
    (mismatched, _) = add_mismatched(ranked(), 1)
    assert mismatched.ranks == (1, 2, None)
    equal = PreferenceDataset([Group(SEQUENCES, scores=[-2.0, None])])
    assert PreferenceDataset([group]).fingerprint != equal.fingerprint
    assert group != equal[0]


def test_ranks_and_scores_are_not_both_given() -> None:
    with pytest.raises(ValueError, match="group 'a': both scores and ranks"):
        Group(SEQUENCES, scores=[1.0, 2.0], ranks=[1, 2], id="a")
    with pytest.raises(ValueError, match="group 'a': ranks must have one entry per sequence; got 1 for 2"):
        Group(SEQUENCES, ranks=[1], id="a")
