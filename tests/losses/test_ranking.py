"""Losses over rankings of N responses, against their equations written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
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
BETA = 0.3

Ranked = list[tuple[float, float]]
"""Score and implicit reward of each rated response of a group."""

# Groups of other sizes, with ties, an unrated response, and a group without any preference.
SCORES = [(0.1, 0.9, 0.4), (1.0, 0.0), (0.5, 0.5, 0.5), (0.0, 1.0, None, 1.0, 0.0, 0.25)]


def plackett_luce(ranked: Ranked) -> float:
    total = 0.0
    for score, reward in ranked:
        worse = [other for other_score, other in ranked if other_score < score]
        total -= math.log(math.exp(reward) / (math.exp(reward) + sum(map(math.exp, worse))))
    return total


def lipo(ranked: Ranked) -> float:
    order = sorted(range(len(ranked)), key=lambda index: -ranked[index][1])
    place = {index: order.index(index) + 1 for index in range(len(ranked))}
    total = 0.0
    for i, (score, reward) in enumerate(ranked):
        for j, (other_score, other) in enumerate(ranked):
            if score > other_score:
                gain = abs((2**score - 1) - (2**other_score - 1))
                discount = abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j]))
                total += gain * discount * math.log(1 + math.exp(other - reward))
    return total


def all_pairs(ranked: Ranked, smoothing: float = 0.0, gap: bool = False) -> float:
    losses, weights = [], []
    for score, reward in ranked:
        for other_score, other in ranked:
            if score > other_score:
                probability = 1 / (1 + math.exp(other - reward))
                losses.append(-(1 - smoothing) * math.log(probability) - smoothing * math.log(1 - probability))
                weights.append(score - other_score if gap else 1.0)
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


def best_vs_rest(ranked: Ranked, pairs: bool = False) -> float:
    top = max(score for score, _ in ranked)
    best = [reward for score, reward in ranked if score == top]
    rest = [reward for score, reward in ranked if score < top]
    if pairs:
        losses = [math.log(1 + math.exp(other - reward)) for reward in best for other in rest]
        return sum(losses) / len(losses)
    return sum(math.log(1 + sum(math.exp(other - reward) for other in rest)) for reward in best) / len(best)


CASES: dict[str, tuple[str, dict[str, object], Callable[[Ranked], float]]] = {
    "plackett_luce": ("plackett_luce", {}, plackett_luce),
    "lipo": ("lipo", {}, lipo),
    "all_pairs": ("all_pairs", {}, all_pairs),
    "all_pairs smoothed": ("all_pairs", {"label_smoothing": 0.2}, lambda ranked: all_pairs(ranked, smoothing=0.2)),
    "all_pairs by gap": ("all_pairs", {"weights": "gap"}, lambda ranked: all_pairs(ranked, gap=True)),
    "best_vs_rest": ("best_vs_rest", {}, best_vs_rest),
    "best_vs_rest pairs": ("best_vs_rest", {"form": "pairs"}, lambda ranked: best_vs_rest(ranked, pairs=True)),
}


def make(case: str) -> kvpref.losses.PreferenceLoss:
    name, settings, _ = CASES[case]
    return make_loss(name, beta=BETA, **settings)


def ranked_groups(batch: kvpref.Batch, policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps) -> list[Ranked]:
    """The rated responses of the groups that have a preference."""
    rewards = [
        BETA * (sum(own) - sum(other)) for own, other in zip(token_lists(policy), token_lists(reference), strict=True)
    ]
    groups = []
    for group, rows in zip(batch.groups, group_slices(batch), strict=True):
        assert group.scores is not None
        pairs = zip(group.scores, rewards[rows], strict=True)
        ranked = [(score, reward) for score, reward in pairs if score is not None]
        if len({score for score, _ in ranked}) > 1:
            groups.append(ranked)
    return groups


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_equation(case: str) -> None:
    batch = scored_batch(SCORES)
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    losses = [CASES[case][2](ranked) for ranked in ranked_groups(batch, policy, reference)]
    assert len(losses) == make(case).num_units(batch) == 3
    output = make(case)(policy, reference, batch)
    assert output.loss.item() == pytest.approx(sum(losses) / 3, abs=TOLERANCE)


def test_plackett_luce_without_ties_draws_one_place_after_the_other() -> None:
    # Equation 20 itself: the product over places of a softmax over what is left.
    batch = scored_batch([(0.3, 0.1, 0.9, 0.5)])
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    (ranked,) = ranked_groups(batch, policy, reference)
    rewards = [reward for _, reward in sorted(ranked, reverse=True)]
    expected = -sum(math.log(math.exp(rewards[k]) / sum(map(math.exp, rewards[k:]))) for k in range(4))
    assert make("plackett_luce")(policy, reference, batch).loss.item() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("case", ["plackett_luce", "all_pairs", "best_vs_rest", "best_vs_rest pairs"])
def test_on_pairs_it_is_dpo(case: str) -> None:
    batch = scored_batch([(0.0, 1.0), (0.7, 0.2)])
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    dpo = make_loss("dpo", beta=BETA)(policy, reference, batch)
    output = make(case)(policy, reference, batch)
    assert output.loss.item() == pytest.approx(dpo.loss.item(), abs=TOLERANCE)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert output.metrics[name].item() == pytest.approx(dpo.metrics[name].item(), abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_the_mean_does_not_depend_on_the_cut_into_micro_batches(case: str) -> None:
    batch, loss = scored_batch(SCORES), make(case)
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    parts = micro_batches(batch, [policy, reference])
    outputs = [loss(own, ref, part) for part, own, ref in parts]
    found = mean_over_units(outputs, [loss.num_units(part) for part, _, _ in parts])
    assert_same_output(found, loss(policy, reference, batch), TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_select_drops_what_is_not_compared_and_keeps_the_loss(case: str) -> None:
    batch, loss = scored_batch(SCORES), make(case)
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    selected = kvpref.collate([loss.select(group) for group in batch.groups])
    assert [len(group) for group in selected.groups] == [3, 2, 1, 5]
    kept = [0, 1, 2, 3, 4, 5, 8, 9, 11, 12, 13]

    def take(logps: kvpref.ResponseLogps) -> kvpref.ResponseLogps:
        parts = logps.token_logps.split(logps.lengths().tolist())
        return kvpref.ResponseLogps(
            torch.cat([parts[index] for index in kept]), selected.cu_seqlens, selected.group_index
        )

    assert loss.num_units(selected) == loss.num_units(batch)
    assert_same_output(loss(take(policy), take(reference), selected), loss(policy, reference, batch), TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_groups_of_equal_scores_give_zero_with_a_gradient_of_zero(case: str) -> None:
    batch, loss = scored_batch([(1.0, 1.0, 1.0), (0.0,), (0.5, None)]), make(case)
    policy = random_logps(batch, 0)
    output = loss(policy, random_logps(batch, 1), batch)
    output.loss.backward()
    assert (output.loss.item(), loss.num_units(batch)) == (0, 0)
    assert policy.token_logps.grad is not None
    assert (policy.token_logps.grad == 0).all()
    assert all(value.item() == 0 for value in output.metrics.values())


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_finite_and_raises_the_best(case: str) -> None:
    # From the reference itself, as at the start of training.
    batch = scored_batch([(0.0, 0.5, 1.0)])
    policy = random_logps(batch, 0)
    make(case)(policy, policy._replace(token_logps=policy.token_logps.detach()), batch).loss.backward()
    gradient = policy.token_logps.grad
    assert gradient is not None
    worst, _, best = gradient.split(policy.lengths().tolist())
    assert (best < 0).all()
    assert (worst > 0).all()


def test_lipo_weights_have_no_gradient_of_their_own() -> None:
    batch = scored_batch([(0.2, 1.0, 0.6)])
    policy, reference = random_logps(batch, 3), random_logps(batch, 4)
    make("lipo")(policy, reference, batch).loss.backward()
    (ranked,) = ranked_groups(batch, policy, reference)
    shift = 1e-6
    for index, tokens in enumerate(policy.token_logps.grad.split(policy.lengths().tolist())):  # type: ignore[union-attr]
        up = [(s, r + shift * (k == index)) for k, (s, r) in enumerate(ranked)]
        down = [(s, r - shift * (k == index)) for k, (s, r) in enumerate(ranked)]
        slope = BETA * (lipo(up) - lipo(down)) / (2 * shift)
        assert tokens.tolist() == pytest.approx([slope] * len(tokens), abs=1e-8)


def test_labels_stand_in_for_scores() -> None:
    scored = scored_batch([(0.0, 1.0, 0.0)])
    labelled = kvpref.collate([kvpref.Group(scored.sequences, labels=(False, True, False), id="file:1")])
    policy, reference = random_logps(scored, 0), random_logps(scored, 1)
    for case in CASES:
        assert make(case)(policy, reference, labelled).loss == make(case)(policy, reference, scored).loss


@pytest.mark.parametrize("case", CASES)
def test_what_it_cannot_use_is_refused(case: str) -> None:
    batch, unrated, loss = scored_batch([(0.0, 1.0)]), scored_batch([(None, None)]), make(case)
    with pytest.raises(kvpref.InputError, match=f"{CASES[case][0]} needs reference log-probs"):
        loss(random_logps(batch, 0), None, batch)
    for use in (lambda: loss.select(unrated.groups[0]), lambda: loss.num_units(unrated)):
        with pytest.raises(kvpref.InputError, match="file:1: no response has a score or a label"):
            use()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("plackett_luce", {"beta": 0}, "plackett_luce: beta must be positive"),
        ("all_pairs", {"weights": "square"}, "all_pairs: unknown weights 'square'; choose from: equal, gap"),
        ("all_pairs", {"label_smoothing": 0.5}, r"all_pairs: label_smoothing must be in \[0, 0.5\)"),
        ("best_vs_rest", {"form": "hard"}, "best_vs_rest: unknown form 'hard'; choose from: softmax, pairs"),
        ("lipo", {"gamma": 1}, "loss 'lipo' has no setting 'gamma'; it has: beta"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_loss(name, **settings)
