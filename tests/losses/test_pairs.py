"""Objectives on pairs against a reference, each against its equation written out in plain floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scored_groups import random_logps, scored_batch, token_lists

import kvpref
from kvpref.losses import make_loss

# float64 scalars
TOLERANCE = 1e-12
BETA = 0.7
# Chosen first or second, lengths 1 to 4, equal and not.
SCORES = [(0.9, 0.1), (0.0, 1.0), (0.2, 0.3), (5.0, -1.0)]


@dataclass(frozen=True)
class Pair:
    """Token log-probs of one pair under policy and reference."""

    chosen: list[float]
    rejected: list[float]
    chosen_ref: list[float]
    rejected_ref: list[float]

    @property
    def ratios(self) -> tuple[float, float]:
        return sum(self.chosen) - sum(self.chosen_ref), sum(self.rejected) - sum(self.rejected_ref)

    @property
    def margin(self) -> float:
        return self.ratios[0] - self.ratios[1]

    @property
    def mean_margin(self) -> float:
        return self.ratios[0] / len(self.chosen) - self.ratios[1] / len(self.rejected)


def batch_and_logps() -> tuple[kvpref.Batch, kvpref.ResponseLogps, kvpref.ResponseLogps]:
    batch = scored_batch(SCORES)
    return batch, random_logps(batch, 0), random_logps(batch, 1)


def pairs_of(policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps) -> list[Pair]:
    ours, theirs = token_lists(policy), token_lists(reference)
    pairs = []
    for index, (first, second) in enumerate(SCORES):
        chosen = 2 * index + (second > first)
        rejected = 4 * index + 1 - chosen
        pairs.append(Pair(ours[chosen], ours[rejected], theirs[chosen], theirs[rejected]))
    return pairs


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smoothed(x: float, e: float) -> float:
    return -(1 - e) * math.log(s(x)) - e * math.log(s(-x))


def robust(pair: Pair, e: float) -> float:
    wrong, right = math.log(s(-BETA * pair.margin)), math.log(s(BETA * pair.margin))
    return (-(1 - e) * right + e * wrong) / (1 - 2 * e)


def exo(pair: Pair, e: float) -> float:
    p = s(BETA * pair.margin)
    return p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e)


def discopop(pair: Pair, tau: float) -> float:
    x = BETA * pair.margin
    w = s(x / tau)
    return (1 - w) * -math.log(s(x)) + w * math.exp(-x)


def nca(pair: Pair) -> float:
    c, r = (BETA * ratio for ratio in pair.ratios)
    return -math.log(s(c)) - 0.5 * math.log(s(-c)) - 0.5 * math.log(s(-r))


def sppo(pair: Pair) -> float:
    c, r = pair.ratios
    return (c - 1 / (2 * BETA)) ** 2 + (r + 1 / (2 * BETA)) ** 2


Equation = Callable[[Pair], float]
EQUATIONS: list[tuple[str, dict[str, Any], Equation]] = [
    ("dpo", {}, lambda pair: smoothed(BETA * pair.margin, 0)),
    ("dpo", {"label_smoothing": 0.2}, lambda pair: smoothed(BETA * pair.margin, 0.2)),
    ("robust", {"label_smoothing": 0.2}, lambda pair: robust(pair, 0.2)),
    ("sigmoid_norm", {}, lambda pair: smoothed(BETA * pair.mean_margin, 0)),
    ("hinge", {}, lambda pair: max(0, 1 - BETA * pair.margin)),
    ("ipo", {}, lambda pair: (pair.mean_margin - 1 / (2 * BETA)) ** 2),
    ("exo", {"label_smoothing": 0.05}, lambda pair: exo(pair, 0.05)),
    ("discopop", {}, lambda pair: discopop(pair, 0.05)),
    ("discopop", {"tau": 0.4}, lambda pair: discopop(pair, 0.4)),
    ("nca", {}, nca),
    ("bco", {}, lambda pair: -math.log(s(BETA * pair.ratios[0])) - math.log(s(-BETA * pair.ratios[1]))),
    ("sppo", {}, sppo),
    ("apo_zero", {}, lambda pair: 1 - s(BETA * pair.ratios[0]) + s(BETA * pair.ratios[1])),
    ("apo_down", {}, lambda pair: s(BETA * pair.ratios[0]) + 1 - s(BETA * pair.margin)),
]
NAMES = [*dict.fromkeys(name for name, _, _ in EQUATIONS), "aot", "aot_unpaired"]
MARGIN_LOSSES = ["dpo", "robust", "sigmoid_norm", "hinge", "ipo", "exo", "discopop"]


@pytest.mark.parametrize(("name", "settings", "equation"), EQUATIONS)
def test_is_its_equation(name: str, settings: dict[str, Any], equation: Equation) -> None:
    batch, policy, reference = batch_and_logps()
    loss = make_loss(name, beta=BETA, **settings)
    pairs = pairs_of(policy, reference)
    output = loss(policy, reference, batch)
    assert output.loss.item() == pytest.approx(mean([equation(pair) for pair in pairs]), abs=TOLERANCE)
    expected = {
        "rewards/chosen": mean([BETA * pair.ratios[0] for pair in pairs]),
        "rewards/rejected": mean([BETA * pair.ratios[1] for pair in pairs]),
        "rewards/margins": mean([BETA * pair.margin for pair in pairs]),
        "rewards/accuracies": mean([float(pair.margin > 0) for pair in pairs]),
        "logps/chosen": mean([sum(pair.chosen) for pair in pairs]),
        "logps/rejected": mean([sum(pair.rejected) for pair in pairs]),
    }
    assert {key: value.item() for key, value in output.metrics.items()} == pytest.approx(expected, abs=TOLERANCE)
    assert not any(value.requires_grad for value in output.metrics.values())
    assert (loss.needs_reference, loss.unit, loss.num_units(batch)) == (True, "groups", len(SCORES))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_aot_matches_sorted_samples(smoothing: float) -> None:
    batch, policy, reference = batch_and_logps()
    pairs = pairs_of(policy, reference)
    above = sorted(sum(pair.chosen) - sum(pair.rejected) for pair in pairs)
    below = sorted(sum(pair.chosen_ref) - sum(pair.rejected_ref) for pair in pairs)
    paired = [smoothed(BETA * (a - b), smoothing) for a, b in zip(above, below, strict=True)]
    chosen, rejected = sorted(pair.ratios[0] for pair in pairs), sorted(pair.ratios[1] for pair in pairs)
    unpaired = [smoothed(BETA * (a - b), smoothing) for a, b in zip(chosen, rejected, strict=True)]
    for name, expected in (("aot", paired), ("aot_unpaired", unpaired)):
        output = make_loss(name, beta=BETA, label_smoothing=smoothing)(policy, reference, batch)
        assert output.loss.item() == pytest.approx(mean(expected), abs=TOLERANCE)
    # The order matters here: without sorting, the sum is another one.
    assert mean(paired) != pytest.approx(mean([smoothed(BETA * pair.margin, smoothing) for pair in pairs]), abs=1e-3)


DERIVATIVES: list[tuple[dict[str, Any], Callable[[float], float]]] = [
    ({"divergence": "forward_kl"}, lambda t: 1 - 1 / t),
    ({"divergence": "js"}, lambda t: math.log(2 * t / (t + 1))),
    ({"divergence": "alpha"}, lambda t: (t**-0.5 - 1) / -0.5),
    ({"divergence": "alpha", "divergence_alpha": 2.5}, lambda t: (t**1.5 - 1) / 1.5),
    ({"divergence": "alpha", "divergence_alpha": 1.0}, math.log),
    ({"divergence": "alpha", "divergence_alpha": 0.0}, lambda t: 1 - 1 / t),
]


@pytest.mark.parametrize(("settings", "derivative"), DERIVATIVES)
def test_divergences_give_the_derivative_of_f(settings: dict[str, Any], derivative: Callable[[float], float]) -> None:
    batch, policy, reference = batch_and_logps()
    losses = []
    for pair in pairs_of(policy, reference):
        chosen, rejected = (derivative(math.exp(ratio)) for ratio in pair.ratios)
        losses.append(smoothed(BETA * (chosen - rejected), 0))
    output = make_loss("dpo", beta=BETA, **settings)(policy, reference, batch)
    assert output.loss.item() == pytest.approx(mean(losses), abs=TOLERANCE)


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_every_margin_loss_reads_the_divergence(name: str) -> None:
    batch, policy, reference = batch_and_logps()
    plain, other = (
        make_loss(name, beta=BETA, divergence=divergence)(policy, reference, batch).loss.item()
        for divergence in ("reverse_kl", "forward_kl")
    )
    assert abs(plain - other) > 1e-3


def test_divergences_stay_finite_in_float32() -> None:
    batch = scored_batch([(1.0, 0.0)])
    reference = random_logps(batch, 1)
    far = torch.full_like(reference.token_logps, -300.0, dtype=torch.float32, requires_grad=True)
    policy = reference._replace(token_logps=far)
    for settings in ({"divergence": "forward_kl"}, {"divergence": "alpha"}):
        loss = make_loss("dpo", **settings)(
            policy, reference._replace(token_logps=reference.token_logps.float()), batch
        )
        assert loss.loss.isfinite()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_alpha_discounts_what_lies_beyond_the_shorter_response(alpha: float) -> None:
    batch, policy, reference = batch_and_logps()
    losses, logps = [], []
    for pair in pairs_of(policy, reference):
        shorter = min(len(pair.chosen), len(pair.rejected))
        c, r, cr, rr = (
            sum(part[:shorter]) + alpha * sum(part[shorter:])
            for part in (pair.chosen, pair.rejected, pair.chosen_ref, pair.rejected_ref)
        )
        losses.append(smoothed(BETA * ((c - cr) - (r - rr)), 0))
        logps.append(c)
    output = make_loss("dpo", beta=BETA, ld_alpha=alpha)(policy, reference, batch)
    assert output.loss.item() == pytest.approx(mean(losses), abs=TOLERANCE)
    assert output.metrics["logps/chosen"].item() == pytest.approx(mean(logps), abs=TOLERANCE)


def test_weighting_multiplies_pairs_and_sends_no_gradient() -> None:
    batch, policy, reference = batch_and_logps()
    loss = make_loss("dpo", beta=BETA, weighting=True)
    assert loss.head == kvpref.HeadOptions(collision=True)
    collision = random_logps(batch, 5).token_logps.detach()
    weighted = policy._replace(collision=collision)
    drawn = [mean(row) for row in token_lists(policy._replace(token_logps=policy.token_logps - collision))]
    losses, weights = [], []
    for index, pair in enumerate(pairs_of(policy, reference)):
        weights.append(math.exp(drawn[2 * index]) * math.exp(drawn[2 * index + 1]))
        losses.append(weights[-1] * smoothed(BETA * pair.margin, 0))
    output = loss(weighted, reference, batch)
    assert output.loss.item() == pytest.approx(mean(losses), abs=TOLERANCE)
    (found,) = torch.autograd.grad(output.loss, policy.token_logps)
    (plain,) = torch.autograd.grad(make_loss("dpo", beta=BETA)(policy, reference, batch).loss, policy.token_logps)
    per_token = policy.per_token(torch.tensor(weights, dtype=torch.float64).repeat_interleave(2))
    assert torch.allclose(found, per_token * plain, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    batch, policy, reference = batch_and_logps()
    loss = make_loss(name, beta=BETA, ld_alpha=0.4)
    assert torch.autograd.gradcheck(
        lambda logps: loss(policy._replace(token_logps=logps), reference, batch).loss, (policy.token_logps,)
    )


# DiscoPOP falls with the margin only away from 0; APO-down lowers the chosen response too.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("discopop", "apo_down")])
def test_gradient_pulls_chosen_up_and_rejected_down(name: str) -> None:
    batch, policy, _ = batch_and_logps()
    reference = policy._replace(token_logps=policy.token_logps.detach())
    make_loss(name, beta=BETA)(policy, reference, batch).loss.backward()
    assert policy.token_logps.grad is not None
    signs = policy.sum_of(policy.token_logps.grad.sign()) / policy.lengths()
    expected = [sign for first, second in SCORES for sign in ((-1.0, 1.0) if first > second else (1.0, -1.0))]
    assert signs.tolist() == expected


def test_discopop_of_a_hopeless_margin_is_finite() -> None:
    batch = scored_batch([(1.0, 0.0)])
    logps = torch.full((batch.num_scored_tokens,), 0.0, dtype=torch.float32)
    logps[: int(batch.cu_seqlens[1])] = -500.0
    policy = random_logps(batch, 0)._replace(token_logps=logps.requires_grad_())
    reference = policy._replace(token_logps=torch.zeros_like(logps))
    loss = make_loss("discopop", beta=1.0)(policy, reference, batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(500.0 * int(batch.cu_seqlens[1]), rel=1e-6)
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_without_reference_is_refused(name: str) -> None:
    batch, policy, _ = batch_and_logps()
    with pytest.raises(kvpref.InputError, match=f"^{name} needs reference log-probs"):
        make_loss(name)(policy, None, batch)


def test_weighting_without_collision_is_refused() -> None:
    batch, policy, reference = batch_and_logps()
    with pytest.raises(kvpref.InputError, match=r"^hinge: weighting needs the policy's `collision`"):
        make_loss("hinge", weighting=True)(policy, reference, batch)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        *[(name, {"beta": 0}, f"^{name}: beta must be positive; got 0") for name in NAMES],
        ("dpo", {"beta": float("nan")}, "^dpo: beta must be positive; got nan"),
        ("dpo", {"beta": "0.1"}, "^dpo: beta must be positive; got '0.1'"),
        ("robust", {"label_smoothing": -0.1}, r"^robust: label_smoothing must be in \[0, 0.5\); got -0.1"),
        ("exo", {"label_smoothing": 0.0}, r"^exo: label_smoothing must be in \(0, 0.5\); got 0.0"),
        ("aot_unpaired", {"weighting": True}, "^aot_unpaired: weighting weighs pairs"),
        ("nca", {"ld_alpha": 1.5}, r"^nca: ld_alpha must be in \[0, 1\]; got 1.5"),
        ("discopop", {"tau": 0}, "^discopop: tau must be positive; got 0"),
        ("ipo", {"divergence": "kl"}, "^ipo: unknown divergence 'kl'; choose from: reverse_kl, forward_kl, js, alpha"),
        ("ipo", {"divergence_alpha": None}, "^ipo: divergence_alpha must be a number; got None"),
        ("sppo", {"divergence": "js"}, "loss 'sppo' has no setting 'divergence'; it has: beta, ld_alpha, weighting"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_loss(name, **settings)
