"""Policy gradients from given rewards: metrics, columns, KL in the rewards, entropy, and what is refused."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from policy_gradient_equations import (
    advantages_of,
    make,
)
from scored_groups import random_logps, scored_batch, token_lists

import kvpref
from kvpref.losses import make_loss

# float64 scalars
TOLERANCE = 1e-12


def test_metrics_are_means_over_units() -> None:
    batch, loss = scored_batch([(0.0, 1.0, 0.25), (0.5, 0.5)]), make("grpo kl")
    policy, reference = random_logps(batch, 0), random_logps(batch, 3)
    metrics = loss(policy, reference, batch).metrics
    pi, ref = token_lists(policy), token_lists(reference)
    d = [[a - b for a, b in zip(own, other, strict=True)] for own, other in zip(pi, ref, strict=True)]
    advantages = [*advantages_of([0.0, 1.0, 0.25], "grpo", "group"), 0.0, 0.0]

    def mean(tokens: list[list[float]]) -> float:
        return sum(sum(row) / len(row) for row in tokens) / len(tokens)

    low = [[math.exp(x) < 0.8 and a < 0 for x in row] for row, a in zip(d, advantages, strict=True)]
    high = [[math.exp(x) > 1.2 and a > 0 for x in row] for row, a in zip(d, advantages, strict=True)]
    assert any(map(any, low))
    assert any(map(any, high))
    expected = {
        "kl": mean([[math.exp(x) * (math.exp(-x) - 1 + x) for x in row] for row in d]),
        "ratio_mean": mean([[math.exp(x) for x in row] for row in d]),
        "clip_ratio/low_mean": mean(low),
        "clip_ratio/high_mean": mean(high),
        "clip_ratio/region_mean": mean(low) + mean(high),
        "advantage": 0.0,
        "reward": (1.25 + 1.0) / 5,
        "reward_std": 3 * statistics.stdev([0.0, 1.0, 0.25]) / 5,
        "frac_reward_zero_std": 2 / 5,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, abs=TOLERANCE)


def test_rloo_takes_the_kl_off_the_rewards_without_gradient() -> None:
    lengths_of = scored_batch([(0.0, 1.0, 0.25), (1.0, 0.0)])
    beta, offset = 0.3, 0.125
    policy, reference = random_logps(lengths_of, 0), random_logps(lengths_of, 1)
    pi, ref = token_lists(policy), token_lists(reference)
    # What the samples were drawn with: exact in the float32 of a column.
    old = [[round(x * 16) / 16 + offset for x in row] for row in pi]
    columns = [{"drawn": old[:3]}, {"drawn": old[3:]}]
    batch = scored_batch([(0.0, 1.0, 0.25), (1.0, 0.0)], columns)
    penalties = [sum(o - r for o, r in zip(a, b, strict=True)) for a, b in zip(old, ref, strict=True)]
    rewards = [s - beta * p for s, p in zip([0.0, 1.0, 0.25, 1.0, 0.0], penalties, strict=True)]
    advantages = [*advantages_of(rewards[:3], "rloo", "none"), *advantages_of(rewards[3:], "rloo", "none")]
    ratios = [math.exp(sum(p) - sum(o)) for p, o in zip(pi, old, strict=True)]
    losses = [-min(ratio * a, min(max(ratio, 0.8), 1.2) * a) for ratio, a in zip(ratios, advantages, strict=True)]
    loss = make_loss("rloo", beta=beta, old="drawn")
    output = loss(policy, reference, batch)
    assert (loss.columns, loss.needs_reference) == (("drawn",), True)
    assert output.loss.item() == pytest.approx(sum(losses) / 5, abs=TOLERANCE)
    output.loss.backward()
    slopes = []
    for ratio, a, tokens in zip(ratios, advantages, pi, strict=True):
        moves = ratio * a <= min(max(ratio, 0.8), 1.2) * a
        slopes += [-ratio * a / 5 if moves else 0.0] * len(tokens)
    assert policy.token_logps.grad is not None
    assert policy.token_logps.grad.tolist() == pytest.approx(slopes, abs=TOLERANCE)


def test_advantages_and_old_logps_from_columns() -> None:
    plain = scored_batch([(0.0, 1.0), (0.5, None)])
    policy = random_logps(plain, 0)
    old = [[round(x * 16) / 16 for x in row] for row in token_lists(policy)]
    columns = [{"gain": [-0.5, 1.5], "drawn": old[:2]}, {"gain": 0.25, "drawn": old[2:]}]
    batch = scored_batch([(0.0, 1.0), (0.5, None)], columns)
    loss = make_loss("grpo", advantages="gain", old="drawn", epsilon=0.01)
    assert loss.columns == ("drawn", "gain")
    # Unrated responses count too: their advantage is given.
    assert loss.num_units(batch) == 4
    assert loss.select(batch.groups[1]) == batch.groups[1]
    total = 0.0
    for tokens, drawn, a in zip(token_lists(policy), old, [-0.5, 1.5, 0.25, 0.25], strict=True):
        ratios = [math.exp(p - o) for p, o in zip(tokens, drawn, strict=True)]
        total -= sum(min(r * a, min(max(r, 0.99), 1.01) * a) for r in ratios) / len(tokens)
    output = loss(policy, None, batch)
    assert output.loss.item() == pytest.approx(total / 4, abs=TOLERANCE)
    assert output.metrics["advantage"].item() == pytest.approx(1.5 / 4, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_the_entropy_bonus_is_a_mean_over_units(name: str) -> None:
    batch = scored_batch([(0.0, 1.0, 0.25)])
    entropy = random_logps(batch, 2).token_logps.detach().abs().requires_grad_()
    policy = random_logps(batch, 0)._replace(entropy=entropy)
    plain, loss = make_loss(name), make_loss(name, entropy_coef=0.5)
    assert (plain.head.entropy, loss.head.entropy) == (False, True)
    rows = [row.tolist() for row in entropy.detach().split(policy.lengths().tolist())]
    means = [sum(row) / len(row) for row in rows]
    bonus = sum(means) / 3 if name == "grpo" else sum(map(sum, rows)) / sum(map(len, rows))
    output = loss(policy, None, batch)
    assert output.metrics["entropy"].item() == pytest.approx(bonus, abs=TOLERANCE)
    difference = plain(policy, None, batch).loss - output.loss
    assert difference.item() == pytest.approx(0.5 * bonus, abs=TOLERANCE)
    output.loss.backward()
    assert entropy.grad is not None
    assert (entropy.grad < 0).all()


def test_select_keeps_the_rated_responses() -> None:
    group = scored_batch([(0.0, None, 1.0)]).groups[0]
    assert make("grpo").select(group).scores == (0.0, 1.0)
    equal = scored_batch([(1.0, None, 1.0)]).groups[0]
    assert make("grpo").select(equal).scores == (1.0, 1.0)
    assert len(make("dapo dynamic").select(equal)) == 1


def test_what_it_cannot_use_is_refused() -> None:
    batch = scored_batch([(0.0, 1.0)])
    policy = random_logps(batch, 0)
    with pytest.raises(kvpref.InputError, match=r"grpo with old='policy' and beta=0.1 needs reference log-probs"):
        make_loss("grpo", beta=0.1)(policy, None, batch)
    with pytest.raises(kvpref.InputError, match="file:1: no column 'drawn'"):
        make_loss("grpo", old="drawn")(policy, None, batch)
    with pytest.raises(kvpref.InputError, match="file:1: no response has a score or a label"):
        make_loss("grpo").select(scored_batch([(None, None)]).groups[0])
    with pytest.raises(kvpref.InputError, match="grpo needs entropies"):
        make_loss("grpo", entropy_coef=0.1)(policy, None, batch)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("grpo", {"scale_rewards": "batch"}, "grpo: unknown scale_rewards 'batch'; choose from: group, none"),
        ("grpo", {"kl_estimator": "k4"}, "grpo: unknown kl_estimator 'k4'; choose from: k1, k2, k3"),
        ("grpo", {"beta": -1}, "grpo: beta must be 0 or more"),
        ("grpo", {"delta": 1.1}, r"grpo: delta must be above 1 \+ epsilon_high \(1.2\); got 1.1"),
        ("dapo", {"epsilon": -0.1}, "dapo: epsilon must be 0 or more"),
        ("gspo", {"temperature": 0}, "temperature must be positive"),
        ("dr_grpo", {"max_completion_length": 0}, "dr_grpo: max_completion_length must be positive"),
        ("cispo", {"epsilon": 0.2}, "loss 'cispo' has no setting 'epsilon'"),
        ("cispo", {"max_ratio": 0}, "cispo: max_ratio must be positive"),
        ("rloo", {"correct_kl": True}, "rloo: .* has no gradient to correct"),
        ("rloo", {"beta": 0.1, "advantages": "gain"}, "rloo: its KL term is a part of the scores"),
        ("rloo", {"beta": 0.1, "old": "reference"}, "rloo: samples from the reference have no KL to it"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_loss(name, **settings)
