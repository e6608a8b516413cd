"""Supervised fine-tuning on the best response and on all by weight, against the equations written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scored_groups import (
    assert_same_output,
    group_slices,
    mean_over_units,
    micro_batches,
    random_logps,
    scored_batch,
    token_lists,
)

import kvpref
from kvpref.losses import make_loss

# float64 scalars
TOLERANCE = 1e-12

SCORES = [(0.0, 1.0, 0.25), (1.0, 0.0), (0.0, 0.0), (0.5, None, 1.0, 1.0)]
COLUMNS = [{"weight": [1, 3, 0]}, {"weight": [0.5, 0.5]}, {"weight": [0, 0]}, {"weight": [0, 2, 0, 0.25]}]

CASES: dict[str, dict[str, Any]] = {
    "scores": {},
    "softmax": {"weights": "softmax", "temperature": 0.5},
    "column": {"weights": "weight"},
}


def weights_of(case: str, index: int) -> list[float]:
    if case == "column":
        return COLUMNS[index]["weight"]
    scores = SCORES[index]
    if case == "scores":
        return [0.0 if score is None else score for score in scores]
    return [0.0 if score is None else math.exp(score / 0.5) for score in scores]


def test_the_mean_over_responses_counts_long_ones_no_more() -> None:
    batch, loss = scored_batch([(0.0, 1.0, 0.25), (1.0, 0.0)]), make_loss("sft", average="response")
    policy = random_logps(batch, 0)
    tokens = token_lists(policy)
    expected = -(sum(tokens[1]) / len(tokens[1]) + sum(tokens[3]) / len(tokens[3])) / 2
    assert len(tokens[1]) != len(tokens[3])
    assert loss(policy, None, batch).loss.item() == pytest.approx(expected, abs=TOLERANCE)
    assert (loss.num_units(batch), loss.unit, make_loss("sft").unit) == (2, "groups", "tokens")


@pytest.mark.parametrize("average", ["token", "response"])
def test_sft_does_not_depend_on_the_cut_into_micro_batches(average: str) -> None:
    batch, loss = scored_batch(SCORES), make_loss("sft", average=average)
    policy = random_logps(batch, 0)
    parts = micro_batches(batch, [policy])
    found = mean_over_units([loss(own, None, part) for part, own in parts], [loss.num_units(part) for part, _ in parts])
    assert_same_output(found, loss(policy, None, batch), TOLERANCE)


@pytest.mark.parametrize("average", ["token", "response"])
def test_sft_on_a_response_without_scored_tokens_is_zero(average: str) -> None:
    silent = kvpref.Sequence((1, 2), (False, False))
    batch = kvpref.collate([kvpref.Group([silent])])
    output = make_loss("sft", average=average)(random_logps(batch, 0), None, batch)
    assert output.loss.item() == 0
    assert output.loss.requires_grad


@pytest.mark.parametrize("case", CASES)
def test_weighted_sft_is_the_weighted_mean_of_each_group(case: str) -> None:
    batch, loss = scored_batch(SCORES, COLUMNS), make_loss("weighted_sft", **CASES[case])
    policy = random_logps(batch, 0)
    tokens = token_lists(policy)
    losses = []
    for index, rows in enumerate(group_slices(batch)):
        weights = weights_of(case, index)
        nll = [-sum(row) / len(row) for row in tokens[rows]]
        if sum(weights):
            losses.append(sum(w * x for w, x in zip(weights, nll, strict=True)) / sum(weights))
    # With softmax, the group of zeros is a plain mean.
    assert loss.num_units(batch) == len(losses) == (4 if case == "softmax" else 3)
    assert loss.columns == (("weight",) if case == "column" else ())
    output = loss(policy, None, batch)
    assert output.loss.item() == pytest.approx(sum(losses) / len(losses), abs=TOLERANCE)
    parts = micro_batches(batch, [policy])
    found = mean_over_units([loss(own, None, part) for part, own in parts], [loss.num_units(part) for part, _ in parts])
    assert_same_output(found, output, TOLERANCE)


@pytest.mark.parametrize(
    ("case", "sizes"), [("scores", [2, 1, 1, 3]), ("softmax", [3, 2, 2, 3]), ("column", [2, 2, 1, 2])]
)
def test_select_keeps_what_has_weight(case: str, sizes: list[int]) -> None:
    batch, loss = scored_batch(SCORES, COLUMNS), make_loss("weighted_sft", **CASES[case])
    selected = kvpref.collate([loss.select(group) for group in batch.groups])
    assert [len(group) for group in selected.groups] == sizes
    assert loss.num_units(selected) == loss.num_units(batch)


def test_groups_without_weight_give_zero_with_a_gradient_of_zero() -> None:
    batch, loss = scored_batch([(0.0, 0.0), (0.0, None)]), make_loss("weighted_sft")
    policy = random_logps(batch, 0)
    output = loss(policy, None, batch)
    output.loss.backward()
    assert (output.loss.item(), loss.num_units(batch)) == (0, 0)
    assert policy.token_logps.grad is not None
    assert (policy.token_logps.grad == 0).all()


SINGLE = ({"scores": (0.0,)}, {"scores": (-1.0,)}, {"labels": (False,)}, {"scores": (0.0, 0.0)})
FINE = (
    {"scores": (0.5,)},
    {"scores": (0.0, 1.0)},
    {"labels": (True, False), "scores": (0.0, 0.0)},
    {"ranks": (1.0, 2.0)},
    {"scores": (-1.0, 0.5)},
)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("sft", {}),
        ("weighted_sft", {"weights": "softmax"}),
        ("mixture", {"weights": {"sft": 1.0, "all_pairs": 1.0}}),
    ],
)
def test_learning_what_is_rated_bad_is_a_caution(loss: str, settings: dict[str, Any]) -> None:
    made = make_loss(loss, **settings)
    sequence = kvpref.Sequence((1, 2, 3), (False, False, True))

    def caution(rated: dict[str, Any]) -> str | None:
        group = kvpref.Group([sequence] * len(next(iter(rated.values()))), **rated)
        assert made.caution(made.select(group)) == made.caution(group)
        return made.caution(group)

    for rated in SINGLE:
        assert str(caution(rated)).startswith("no response is labelled true or scored above 0, and one is learned")
    for rated in FINE:
        assert caution(rated) is None


def test_demonstrations_and_losses_that_read_labels_have_no_caution() -> None:
    sequence = kvpref.Sequence((1, 2, 3), (False, False, True))
    assert make_loss("sft").caution(kvpref.Group([sequence])) is None
    bad = kvpref.Group([sequence], scores=(0.0,))
    assert make_loss("kto").caution(bad) is None
    assert make_loss("weighted_sft").caution(bad) is None


def test_softmax_of_large_scores_does_not_overflow() -> None:
    batch, loss = scored_batch([(1000.0, 999.0)]), make_loss("weighted_sft", weights="softmax")
    policy = random_logps(batch, 0)
    first, second = (-sum(row) / len(row) for row in token_lists(policy))
    expected = (first + math.exp(-1) * second) / (1 + math.exp(-1))
    assert loss(policy, None, batch).loss.item() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("scores", "columns", "settings", "message"),
    [
        ((-1.0, 1.0), {}, {}, "file:1: the weights .* must not be negative; found -1.0; weights='softmax' takes any"),
        ((0.0, 1.0), {"w": [-1, 1]}, {"weights": "w"}, "file:1: the weights .* must not be negative; found -1.0$"),
        ((0.0, 1.0), {"w": 3}, {"weights": "w"}, r"file:1: .* column 'w' with one number per response \(2\); found 3"),
        ((0.0, 1.0), {"w": ["a", "b"]}, {"weights": "w"}, "file:1: .* column 'w' with one number per response"),
        ((0.0, 1.0), {}, {"weights": "w"}, "file:1: .* column 'w' with one number per response .*; found None"),
        ((None, None), {}, {"weights": "softmax"}, "file:1: no response has a score or a label"),
    ],
)
def test_what_weighted_sft_cannot_use_is_refused(
    scores: tuple[float | None, ...], columns: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    group = scored_batch([scores], [columns]).groups[0]
    with pytest.raises(kvpref.InputError, match=message):
        make_loss("weighted_sft", **settings).select(group)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sft", {"average": "sum"}, "sft: unknown average 'sum'; choose from: token, response"),
        ("weighted_sft", {"weights": "softmax", "temperature": 0}, "weighted_sft: temperature must be positive"),
        ("weighted_sft", {"temperature": 2.0}, "weighted_sft: temperature is for weights='softmax'"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_loss(name, **settings)
