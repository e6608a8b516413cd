"""Losses of reward models, against their equations written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scored_groups import Scores, assert_same_output, group_slices, mean_over_units, scored_batch

import kvpref
from kvpref.losses import PreferenceLoss, make_loss
from kvpref.records.outputs import ResponseRewards

# float64 scalars
TOLERANCE = 1e-12

# Groups of other sizes, with ties, an unrated response, and a group without any preference.
SCORES: list[Scores] = [(0.1, 0.9, 0.4), (1.0, 0.0), (0.5, 0.5), (0.0, 1.0, None, 1.0, 0.25)]
# One margin for a group, or one per response.
MARGINS: list[Any] = [0.5, [0.75, 0.25], 2.0, [0.0, 1.0, 9.0, 0.5, 0.25]]

Ranked = list[tuple[float, float, float]]
"""Score, reward and margin of each rated response of a group."""


def random_rewards(batch: kvpref.Batch, seed: int) -> ResponseRewards:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(batch.num_sequences, generator=generator, dtype=torch.float64)
    return ResponseRewards(rewards.requires_grad_(), batch.group_index)


def bradley_terry(
    ranked: Ranked, centering: float = 0.0, margin: Callable[[float, float], float] | None = None
) -> float:
    losses = []
    for score, reward, own in ranked:
        for other_score, other, others in ranked:
            if score > other_score:
                lead = reward - other - (margin(own, others) if margin else 0.0)
                losses.append(math.log(1 + math.exp(-lead)) + centering * (reward + other) ** 2)
    return sum(losses) / len(losses)


def plackett_luce(ranked: Ranked) -> float:
    total = 0.0
    for score, reward, _ in ranked:
        worse = [other for other_score, other, _ in ranked if other_score < score]
        total -= math.log(math.exp(reward) / (math.exp(reward) + sum(map(math.exp, worse))))
    return total


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Ranked], float]]] = {
    "bradley_terry": ("bradley_terry", {}, bradley_terry),
    "centered": (
        "bradley_terry",
        {"center_rewards_coefficient": 0.05},
        lambda ranked: bradley_terry(ranked, centering=0.05),
    ),
    "plackett_luce_reward": ("plackett_luce_reward", {}, plackett_luce),
}


def make(case: str) -> PreferenceLoss:
    return make_loss(CASES[case][0], **CASES[case][1])


def ranked_groups(batch: kvpref.Batch, policy: ResponseRewards) -> list[Ranked]:
    """The rated responses of the groups that have a preference."""
    groups = []
    for group, rows, margins in zip(batch.groups, group_slices(batch), MARGINS, strict=False):
        assert group.scores is not None
        of_each = margins if isinstance(margins, list) else [margins] * len(group)
        rated = zip(group.scores, policy.rewards[rows].tolist(), of_each, strict=True)
        ranked = [(score, reward, margin) for score, reward, margin in rated if score is not None]
        if len({score for score, _, _ in ranked}) > 1:
            groups.append(ranked)
    return groups


def one_group_each(batch: kvpref.Batch, policy: ResponseRewards) -> list[tuple[kvpref.Batch, ResponseRewards]]:
    parts = [kvpref.collate([group]) for group in batch.groups]
    slices = group_slices(batch)
    return [
        (part, ResponseRewards(policy.rewards[rows], part.group_index))
        for part, rows in zip(parts, slices, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_equation(case: str) -> None:
    batch, loss = scored_batch(SCORES), make(case)
    policy = random_rewards(batch, 0)
    losses = [CASES[case][2](ranked) for ranked in ranked_groups(batch, policy)]
    assert (loss.reads, loss.needs_reference, loss.num_units(batch)) == ("ends", False, len(losses))
    assert loss(policy, None, batch).loss.item() == pytest.approx(sum(losses) / 3, abs=TOLERANCE)


def test_margins_are_of_groups_or_differences_of_responses() -> None:
    batch = scored_batch(SCORES, [{"margin": value} for value in MARGINS])
    policy, loss = random_rewards(batch, 0), make_loss("bradley_terry", margin_column="margin")
    first, second, fourth = ranked_groups(batch, policy)
    losses = [
        bradley_terry(first, margin=lambda own, other: 0.5),
        bradley_terry(second, margin=lambda own, other: own - other),
        bradley_terry(fourth, margin=lambda own, other: own - other),
    ]
    assert loss.columns == ("margin",)
    assert loss(policy, None, batch).loss.item() == pytest.approx(sum(losses) / 3, abs=TOLERANCE)
    # What belongs to a response goes with it.
    selected = loss.select(batch.groups[3])
    assert selected.columns["margin"] == [0.0, 1.0, 0.5, 0.25]


def test_metrics_are_means_over_groups() -> None:
    batch = scored_batch([(0.0, 1.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
    rewards = torch.tensor([0.5, 2.0, 0.25, -1.0, 1.0, 7.0, 8.0], dtype=torch.float64, requires_grad=True)
    metrics = make_loss("bradley_terry")(ResponseRewards(rewards, batch.group_index), None, batch).metrics
    expected = {
        "accuracy": (1 / 2 + 0) / 2,
        "margin": ((2.25 / 2 - 0.5) + (-1.0 - 1.0)) / 2,
        "mean_reward": (2.75 / 3 + 0) / 2,
        "min_reward": (0.25 - 1) / 2,
        "max_reward": (2 + 1) / 2,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_the_mean_does_not_depend_on_the_cut_into_micro_batches(case: str) -> None:
    batch, loss = scored_batch(SCORES), make(case)
    policy = random_rewards(batch, 0)
    parts = one_group_each(batch, policy)
    found = mean_over_units([loss(own, None, part) for part, own in parts], [loss.num_units(part) for part, _ in parts])
    assert_same_output(found, loss(policy, None, batch), TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_groups_of_equal_scores_give_zero_with_a_gradient_of_zero(case: str) -> None:
    batch, loss = scored_batch([(1.0, 1.0, 1.0), (0.0,), (0.5, None)]), make(case)
    policy = random_rewards(batch, 0)
    output = loss(policy, None, batch)
    output.loss.backward()
    assert (output.loss.item(), loss.num_units(batch)) == (0, 0)
    assert policy.rewards.grad is not None
    assert (policy.rewards.grad == 0).all()
    assert all(value.item() == 0 for value in output.metrics.values())
    assert [len(loss.select(group)) for group in batch.groups] == [1, 1, 1]


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_parts_the_best_from_the_worst(case: str) -> None:
    batch = scored_batch([(0.0, 0.5, 1.0)])
    rewards = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    make(case)(ResponseRewards(rewards, batch.group_index), None, batch).loss.backward()
    assert rewards.grad is not None
    assert rewards.grad[0] > 0 > rewards.grad[2]
    assert rewards.grad.sum().item() == pytest.approx(0, abs=TOLERANCE)


@pytest.mark.parametrize("objective", ["mse", "bce"])
def test_regression_is_a_mean_over_rated_responses(objective: str) -> None:
    batch, loss = scored_batch(SCORES), make_loss("reward_regression", objective=objective)
    policy = random_rewards(batch, 0)
    losses, errors, rewards = [], [], []
    for group, rows in zip(batch.groups, group_slices(batch), strict=True):
        assert group.scores is not None
        for score, reward in zip(group.scores, policy.rewards[rows].tolist(), strict=True):
            if score is None:
                continue
            probability = 1 / (1 + math.exp(-reward))
            rewards.append(reward)
            if objective == "mse":
                losses.append((reward - score) ** 2)
                errors.append(abs(reward - score))
            else:
                losses.append(-score * math.log(probability) - (1 - score) * math.log(1 - probability))
                errors.append(abs(probability - score))
    output = loss(policy, None, batch)
    assert loss.num_units(batch) == len(losses) == 11
    assert loss.unit == "sequences"
    assert output.loss.item() == pytest.approx(sum(losses) / 11, abs=TOLERANCE)
    assert output.metrics["mean_error"].item() == pytest.approx(sum(errors) / 11, abs=TOLERANCE)
    assert output.metrics["mean_reward"].item() == pytest.approx(sum(rewards) / 11, abs=TOLERANCE)
    parts = one_group_each(batch, policy)
    found = mean_over_units([loss(own, None, part) for part, own in parts], [loss.num_units(part) for part, _ in parts])
    assert_same_output(found, output, TOLERANCE)
    assert loss.select(batch.groups[3]).scores == (0.0, 1.0, 1.0, 0.25)


def test_what_they_cannot_use_is_refused() -> None:
    batch, unrated = scored_batch([(0.0, 1.5)]), scored_batch([(None, None)])
    with pytest.raises(kvpref.InputError, match=r"file:1: .*'bce' needs scores in \[0, 1\]; found 1.5"):
        make_loss("reward_regression", objective="bce")(random_rewards(batch, 0), None, batch)
    with pytest.raises(kvpref.InputError, match="file:1: no column 'margin'"):
        make_loss("bradley_terry", margin_column="margin")(random_rewards(batch, 0), None, batch)
    for name in ("bradley_terry", "plackett_luce_reward", "reward_regression"):
        with pytest.raises(kvpref.InputError, match="file:1: no response has a score or a label"):
            make_loss(name).select(unrated.groups[0])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bradley_terry", {"center_rewards_coefficient": -1}, "center_rewards_coefficient must be 0 or more"),
        ("reward_regression", {"objective": "mae"}, "unknown objective 'mae'; choose from: mse, bce"),
        ("plackett_luce_reward", {"beta": 1}, "loss 'plackett_luce_reward' has no setting 'beta'"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_loss(name, **settings)
