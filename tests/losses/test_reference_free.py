"""Objectives on pairs without a reference, each against its equation written out in plain floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scored_groups import random_logps, scored_batch, token_lists

import kvpref
from kvpref.losses import make_loss

# float64 scalars
TOLERANCE = 1e-12
BETA = 0.7
# Chosen first or second, lengths 1 to 4.
SCORES = [(0.9, 0.1), (0.0, 1.0), (5.0, -1.0)]

Equation = Callable[[list[float], list[float]], float]
"""Of the token log-probs of the chosen and of the rejected response."""


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def simpo(chosen: list[float], rejected: list[float]) -> float:
    return -math.log(s(BETA * mean(chosen) - BETA * mean(rejected) - 0.4))


def smoothed_simpo(chosen: list[float], rejected: list[float]) -> float:
    margin = BETA * mean(chosen) - BETA * mean(rejected) - 0.4
    return -0.8 * math.log(s(margin)) - 0.2 * math.log(s(-margin))


def alphapo(alpha: float) -> Equation:
    def reward(logps: list[float]) -> float:
        return BETA * (1 - math.exp(mean(logps)) ** -alpha) / alpha

    return lambda chosen, rejected: -math.log(s(reward(chosen) - reward(rejected) - 0.4))


def orpo(chosen: list[float], rejected: list[float]) -> float:
    won, lost = math.exp(mean(chosen)), math.exp(mean(rejected))
    return -mean(chosen) - BETA * math.log(s(math.log((won / (1 - won)) / (lost / (1 - lost)))))


def cpo(chosen: list[float], rejected: list[float]) -> float:
    return -math.log(s(BETA * (sum(chosen) - sum(rejected)))) - 0.3 * mean(chosen)


EQUATIONS: list[tuple[str, dict[str, Any], Equation]] = [
    ("simpo", {"gamma": 0.4}, simpo),
    ("simpo", {"gamma": 0.4, "label_smoothing": 0.2}, smoothed_simpo),
    ("alphapo", {"gamma": 0.4, "alpha": 0.25}, alphapo(0.25)),
    ("alphapo", {"gamma": 0.4, "alpha": -0.5}, alphapo(-0.5)),
    ("alphapo", {"gamma": 0.4, "alpha": 0}, simpo),
    ("orpo", {}, orpo),
    ("cpo", {"cpo_alpha": 0.3}, cpo),
    ("cpo", {"form": "hinge", "cpo_alpha": 0}, lambda c, r: max(0, 1 - BETA * (sum(c) - sum(r)))),
]
NAMES = list(dict.fromkeys(name for name, _, _ in EQUATIONS))


def pairs_of(policy: kvpref.ResponseLogps) -> list[tuple[list[float], list[float]]]:
    rows = token_lists(policy)
    pairs = [(rows[2 * index], rows[2 * index + 1]) for index in range(len(SCORES))]
    return [pair if first > second else pair[::-1] for pair, (first, second) in zip(pairs, SCORES, strict=True)]


@pytest.mark.parametrize(("name", "settings", "equation"), EQUATIONS)
def test_is_its_equation(name: str, settings: dict[str, Any], equation: Equation) -> None:
    batch = scored_batch(SCORES)
    policy = random_logps(batch, 0)
    loss = make_loss(name, beta=BETA, **settings)
    output = loss(policy, None, batch)
    expected = mean([equation(*pair) for pair in pairs_of(policy)])
    assert output.loss.item() == pytest.approx(expected, abs=TOLERANCE)
    assert not loss.needs_reference
    assert not any(value.requires_grad for value in output.metrics.values())


def test_metrics_are_means_over_pairs() -> None:
    batch = scored_batch(SCORES)
    policy = random_logps(batch, 0)
    pairs = pairs_of(policy)
    found = make_loss("cpo", beta=BETA)(policy, None, batch).metrics
    expected = {
        "rewards/chosen": mean([BETA * sum(chosen) for chosen, _ in pairs]),
        "rewards/rejected": mean([BETA * sum(rejected) for _, rejected in pairs]),
        "rewards/margins": mean([BETA * (sum(chosen) - sum(rejected)) for chosen, rejected in pairs]),
        "rewards/accuracies": mean([float(sum(chosen) > sum(rejected)) for chosen, rejected in pairs]),
        "logps/chosen": mean([sum(chosen) for chosen, _ in pairs]),
        "logps/rejected": mean([sum(rejected) for _, rejected in pairs]),
        "nll_per_token": mean([-mean(chosen) for chosen, _ in pairs]),
    }
    assert {key: value.item() for key, value in found.items()} == pytest.approx(expected, abs=TOLERANCE)
    rewards = make_loss("alphapo", beta=BETA, alpha=0.5)(policy, None, batch).metrics["rewards/chosen"].item()
    by_hand = mean([BETA * (1 - math.exp(mean(chosen)) ** -0.5) / 0.5 for chosen, _ in pairs])
    assert rewards == pytest.approx(by_hand, abs=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    batch = scored_batch(SCORES)
    policy = random_logps(batch, 0)
    loss = make_loss(name, beta=BETA)
    assert torch.autograd.gradcheck(
        lambda logps: loss(policy._replace(token_logps=logps), None, batch).loss, (policy.token_logps,)
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradient_pulls_chosen_up_and_rejected_down(name: str) -> None:
    batch = scored_batch(SCORES)
    policy = random_logps(batch, 0)
    make_loss(name, beta=BETA)(policy, None, batch).loss.backward()
    assert policy.token_logps.grad is not None
    signs = policy.sum_of(policy.token_logps.grad.sign()) / policy.lengths()
    expected = [sign for first, second in SCORES for sign in ((-1.0, 1.0) if first > second else (1.0, -1.0))]
    assert signs.tolist() == expected


@pytest.mark.parametrize("logp", [0.0, -1e-7, -0.6931, -0.6932, -60.0])
def test_orpo_is_finite_at_any_likelihood(logp: float) -> None:
    batch = scored_batch([(1.0, 0.0)])
    logps = torch.full((batch.num_scored_tokens,), -1.0)
    logps[: int(batch.cu_seqlens[1])] = logp
    policy = random_logps(batch, 0)._replace(token_logps=logps.requires_grad_())
    loss = make_loss("orpo")(policy, None, batch).loss
    loss.backward()
    assert loss.isfinite()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        *[(name, {"beta": -1.0}, f"^{name}: beta must be positive; got -1.0") for name in NAMES],
        ("simpo", {"gamma": -0.1}, "^simpo: gamma must be 0 or more; got -0.1"),
        ("alphapo", {"label_smoothing": 0.5}, r"^alphapo: label_smoothing must be in \[0, 0.5\)"),
        ("alphapo", {"alpha": float("inf")}, "^alphapo: alpha must be a number; got inf"),
        ("cpo", {"form": "ipo"}, "^cpo: unknown form 'ipo'; choose from: sigmoid, hinge"),
        ("cpo", {"cpo_alpha": -1}, "^cpo: cpo_alpha must be 0 or more; got -1"),
        ("orpo", {"gamma": 1}, "loss 'orpo' has no setting 'gamma'; it has: beta"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_loss(name, **settings)


def test_what_is_no_pair_is_refused() -> None:
    batch = scored_batch([(1.0, 0.0, 0.5)])
    with pytest.raises(kvpref.InputError, match="file:1: a pairwise loss needs exactly 2 responses"):
        make_loss("simpo")(random_logps(batch, 0), None, batch)
