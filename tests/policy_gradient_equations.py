"""The equations of the policy gradients as loops over groups, responses and tokens, with gradients by hand."""

from __future__ import annotations

import math
import statistics
from typing import Any

from scored_groups import group_slices, token_lists

import kvpref
from kvpref.losses import PreferenceLoss, make_loss

# Groups of other sizes; an unrated response, a group of equal scores and one of a single response.
SCORES = [(0.0, 1.0, 0.25), (1.0, 0.0), (0.5, 0.5), (0.0, None, 1.0, 1.0, 0.0), (2.0,)]

MAX_LENGTH = 7

# Every method with samples from the reference, and what else it can do; ratios lie on both sides of every clip.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {}),
    "grpo asymmetric": ("grpo", {"epsilon": 0.1, "epsilon_high": 0.5, "delta": 1.6}),
    "grpo kl": ("grpo", {"beta": 0.3}),
    "grpo k1": ("grpo", {"beta": 0.3, "kl_estimator": "k1", "scale_rewards": "none"}),
    "grpo k2": ("grpo", {"beta": 0.3, "kl_estimator": "k2", "correct_kl": False}),
    "grpo k3": ("grpo", {"beta": 0.3, "correct_kl": False}),
    "dr_grpo": ("dr_grpo", {"max_completion_length": MAX_LENGTH, "beta": 0.1}),
    "dapo": ("dapo", {}),
    "dapo dynamic": ("dapo", {"dynamic_sampling": True, "beta": 0.2}),
    "bnpo": ("bnpo", {"beta": 0.2}),
    "cispo": ("cispo", {"max_ratio": 1.3, "beta": 0.2}),
    "gspo": ("gspo", {"epsilon": 0.1, "epsilon_high": 0.15, "beta": 0.2}),
    "rloo": ("rloo", {"epsilon": 0.4}),
}
CLIPS: dict[str, tuple[float, float]] = {"dapo": (0.2, 0.28)}


def make(case: str, **settings: Any) -> PreferenceLoss:
    name, own = CASES[case]
    return make_loss(name, **{"old": "reference", **own, **settings})


def advantages_of(scores: list[float], name: str, scale: str) -> list[float]:
    if len(scores) == 1:
        return [0.0]
    if name == "rloo":
        return [score - (sum(scores) - score) / (len(scores) - 1) for score in scores]
    mean = sum(scores) / len(scores)
    divisor = statistics.stdev(scores) + 1e-4 if scale == "group" else 1.0
    return [(score - mean) / divisor for score in scores]


def expected_loss_and_gradient(
    case: str, batch: kvpref.Batch, policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps, **changes: Any
) -> tuple[float, list[float]]:
    """Loops over groups, responses and tokens; the derivative of each term is written by hand."""
    name, settings = CASES[case][0], {**CASES[case][1], **changes}
    scale = settings.get("scale_rewards", "none" if name in ("dr_grpo", "rloo") else "group")
    pi, ref = token_lists(policy), token_lists(reference)
    loss, units, gradient = 0.0, 0, [[0.0] * len(tokens) for tokens in pi]
    for group, rows in zip(batch.groups, group_slices(batch), strict=True):
        assert group.scores is not None
        rated = [index for index, score in enumerate(group.scores) if score is not None]
        scores = [group.scores[index] for index in rated]
        if settings.get("dynamic_sampling") and len(set(scores)) == 1:
            continue
        for index, advantage in zip(rated, advantages_of(scores, name, scale), strict=True):  # type: ignore[arg-type]
            row = rows.start + index
            length = len(pi[row])
            by_token = name in ("dapo", "bnpo", "cispo")
            units += length if by_token else 1
            share = 1 if by_token else 1 / MAX_LENGTH if name == "dr_grpo" else 1 / length
            log_ratios = [a - b for a, b in zip(pi[row], ref[row], strict=True)]
            for t in range(length):
                value, slopes = token_terms(name, settings, advantage, pi[row][t], log_ratios, t)
                loss += share * value
                for position, slope in slopes.items():
                    gradient[row][position] += share * slope
    return loss / units, [slope / units for tokens in gradient for slope in tokens]


def token_terms(
    name: str, settings: dict[str, Any], advantage: float, logp: float, log_ratios: list[float], t: int
) -> tuple[float, dict[int, float]]:
    """A token's loss and its derivative by the log-prob of each token of the response."""
    positions = range(len(log_ratios)) if name in ("gspo", "rloo") else [t]
    level = 1 / len(log_ratios) if name == "gspo" else 1.0
    ratio = math.exp(sum(log_ratios[position] for position in positions) * level)
    if name == "cispo":
        weight = min(ratio, settings["max_ratio"])
        value, slopes = -weight * advantage * logp, {t: -weight * advantage}
    else:
        low, high = CLIPS.get(name, (0.2, 0.2))
        low = settings.get("epsilon", low)
        high = settings.get("epsilon_high", settings.get("epsilon", high))
        bounded = min(ratio, settings.get("delta", math.inf))
        clipped = min(max(ratio, 1 - low), 1 + high)
        value = -min(bounded * advantage, clipped * advantage)
        # No gradient where the clipped term is the smaller one, or the bound holds.
        moves = bounded * advantage <= clipped * advantage and bounded == ratio
        slopes = dict.fromkeys(positions, -ratio * advantage * level if moves else 0.0)
    beta = settings.get("beta", 0.0)
    d = log_ratios[t]
    kl, slope = {
        "k1": (d, 1.0),
        "k2": (d * d / 2, d),
        "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
    }[settings.get("kl_estimator", "k3")]
    if not settings.get("correct_kl", True):
        ratio = 1.0
    else:
        for position in positions:
            slopes[position] = slopes.get(position, 0.0) + beta * kl * ratio * level
    slopes[t] += beta * slope * ratio
    return value + beta * kl * ratio, slopes
