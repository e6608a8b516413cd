"""Weighted sums of losses against the sums of their parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scored_groups import micro_batches, random_logps, scored_batch, token_lists

import kvpref
from kvpref import Group
from kvpref.losses import make_loss

# float64 scalars
TOLERANCE = 1e-12
SCORES = [(0.9, 0.1), (0.0, 1.0), (5.0, -1.0)]


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ratios_and_means(policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps) -> list[tuple[float, float, float]]:
    """Log-ratio of the chosen, of the rejected, mean log-prob of the chosen; per pair."""
    ours, theirs = token_lists(policy), token_lists(reference)
    found = []
    for index, (first, second) in enumerate(SCORES):
        chosen = 2 * index + (second > first)
        rejected = 4 * index + 1 - chosen
        ratios = [sum(ours[row]) - sum(theirs[row]) for row in (chosen, rejected)]
        found.append((ratios[0], ratios[1], sum(ours[chosen]) / len(ours[chosen])))
    return found


def test_mpo_is_its_equation() -> None:
    batch = scored_batch(SCORES)
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    losses = [
        -0.8 * math.log(s(0.1 * (c - r))) - 0.2 * (math.log(s(0.1 * c)) + math.log(s(-0.1 * r))) - m
        for c, r, m in ratios_and_means(policy, reference)
    ]
    loss = make_loss("mpo")
    assert loss(policy, reference, batch).loss.item() == pytest.approx(sum(losses) / 3, abs=TOLERANCE)
    assert (loss.needs_reference, loss.unit, loss.num_units(batch)) == (True, "groups", 3)


def test_rpo_is_its_equation() -> None:
    batch = scored_batch(SCORES)
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    losses = [-math.log(s(0.3 * (c - r))) - 0.5 * m for c, r, m in ratios_and_means(policy, reference)]
    loss = make_loss("rpo", alpha=0.5, settings={"dpo": {"beta": 0.3}})
    assert loss(policy, reference, batch).loss.item() == pytest.approx(sum(losses) / 3, abs=TOLERANCE)
    assert make_loss("rpo", alpha=0)(policy, reference, batch).loss == make_loss("dpo")(policy, reference, batch).loss


def test_a_mixture_is_the_weighted_sum_with_the_metrics_of_all() -> None:
    batch = scored_batch(SCORES)
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    mixture = make_loss("mixture", weights={"ipo": 0.3, "simpo": 2.0}, settings={"ipo": {"beta": 0.4}})
    ipo, simpo = make_loss("ipo", beta=0.4)(policy, reference, batch), make_loss("simpo")(policy, None, batch)
    found = mixture(policy, reference, batch)
    assert found.loss.item() == pytest.approx(0.3 * ipo.loss.item() + 2.0 * simpo.loss.item(), abs=TOLERANCE)
    assert found.metrics["loss/ipo"] == ipo.loss
    assert found.metrics["loss/simpo"] == simpo.loss
    assert found.metrics["rewards/chosen"] == ipo.metrics["rewards/chosen"] != simpo.metrics["rewards/chosen"]
    assert not any(value.requires_grad for value in found.metrics.values())


def test_what_parts_need_is_joined() -> None:
    mixture = make_loss("mixture", weights={"dpo": 1.0, "simpo": 1.0}, settings={"dpo": {"weighting": True}})
    assert mixture.head == kvpref.HeadOptions(collision=True)
    assert mixture.needs_reference
    assert not make_loss("mixture", weights={"simpo": 1.0, "orpo": 1.0}).needs_reference
    weighted = make_loss("mixture", weights={"dpo": 1, "weighted_sft": 1}, settings={"weighted_sft": {"weights": "w"}})
    assert weighted.columns == ("w",)


def test_parts_may_leave_groups_out_however_they_are_cut() -> None:
    # The second group has no preference: Plackett-Luce leaves it out, SFT does not.
    batch = scored_batch([(0.9, 0.1, 0.4), (0.5, 0.5), (0.0, 1.0)])
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    mixture = make_loss("mixture", weights={"plackett_luce": 2.0, "sft": 0.5})
    ranked, sft = make_loss("plackett_luce"), make_loss("sft", average="response")
    assert (ranked.num_units(batch), sft.num_units(batch)) == (2, 3)
    expected = 2.0 * ranked(policy, reference, batch).loss * 2 / 3 + 0.5 * sft(policy, None, batch).loss
    assert mixture(policy, reference, batch).loss.item() == pytest.approx(expected.item(), abs=TOLERANCE)
    parts = micro_batches(batch, [policy, reference])
    losses = [mixture(own, theirs, part).loss.item() * mixture.num_units(part) for part, own, theirs in parts]
    assert sum(losses) / mixture.num_units(batch) == pytest.approx(expected.item(), abs=TOLERANCE)


def test_select_keeps_what_any_part_reads() -> None:
    (pair,) = scored_batch([(0.1, 0.9)]).groups
    assert len(make_loss("sft").select(pair)) == 1
    assert make_loss("mpo").select(pair) == pair
    assert make_loss("mixture", weights={"sft": 2.0}).select(pair) == make_loss("sft").select(pair)


def test_a_part_alone_prepares_its_groups() -> None:
    groups = [
        Group([kvpref.Sequence.from_prompt_and_response([1, index], [3, 4])], labels=[True]) for index in range(2)
    ]
    prepared = make_loss("mixture", weights={"kto": 1.0}).prepare(groups)
    assert [len(group) for group in prepared] == [2, 2]


def test_a_users_loss_can_be_a_part(tmp_path: Any) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def shorter(policy, reference, batch, *, scale=1.0):\n    return scale * policy.mean().mean()\n")
    batch = scored_batch(SCORES)
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    name = f"{path}:shorter"
    mixture = make_loss("mixture", weights={"dpo": 1.0, name: 0.5}, settings={name: {"scale": 3.0}})
    expected = make_loss("dpo")(policy, reference, batch).loss + 1.5 * policy.mean().mean()
    assert mixture(policy, reference, batch).loss.item() == pytest.approx(expected.item(), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs the setting 'weights'"),
        ({"weights": {}}, "^mixture: no loss has a weight above 0"),
        ({"weights": {"dpo": 0.0}}, "^mixture: no loss has a weight above 0"),
        ({"weights": ["dpo"]}, "^mixture: weights and settings must be mappings"),
        ({"weights": {"dpo": -1}}, r"^mixture: weights\['dpo'\] must be 0 or more; got -1"),
        ({"weights": {"dpo": 1, "what": 1}}, "unknown loss 'what'; choose from: dpo"),
        ({"weights": {"dpo": 1, "mpo": 1}}, "unknown loss 'mpo'"),
        ({"weights": {"dpo": 1}, "settings": {"ipo": {}}}, "^mixture: settings for 'ipo', which is not one of: dpo"),
        ({"weights": {"dpo": 1}, "settings": {"dpo": {"tau": 1}}}, "loss 'dpo' has no setting 'tau'"),
        ({"weights": {"dpo": 1}, "settings": {"dpo": {"beta": 0}}}, "^dpo: beta must be positive"),
        (
            {"weights": {"dpo": 1, "sft": 1}, "settings": {"sft": {"average": "token"}}},
            "^mixture: 'dpo' is a mean over groups and 'sft' a mean over tokens, so they cannot be mixed",
        ),
        ({"weights": {"dpo": 1, "kto": 1}}, "'dpo' is a mean over groups and 'kto' a mean over sequences"),
        ({"weights": {"dpo": 1, "bradley_terry": 1}}, "'dpo' is a function of tokens and 'bradley_terry' .* ends"),
        ({"weights": {"apo_zero_unpaired": 1, "kto": 1}}, "'kto' adds responses that the others must not read"),
    ],
)
def test_what_cannot_be_mixed_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_loss("mixture", **settings)


def test_different_counts_of_one_unit_are_refused() -> None:
    batch = scored_batch([(1.0, 0.0)])
    mixture = make_loss("mixture", weights={"dapo": 1, "sft": 1}, settings={"sft": {"average": "token"}})
    with pytest.raises(kvpref.InputError, match=r"^mixture: the losses count different tokens"):
        mixture.num_units(batch)
