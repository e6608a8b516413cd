"""KTO and its like against their equations, and the mismatched responses that KTO is given."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import preference_runs
import pytest
import torch
from scored_groups import random_logps, token_lists

import kvpref
from kvpref import Group, Sequence
from kvpref.data import PreferenceDataset
from kvpref.losses import KTO, make_loss
from kvpref.losses.mismatched import MISMATCHED, mismatched_flags
from kvpref.training.loading.selection import select_groups

# float64 scalars
TOLERANCE = 1e-12
BETA, DESIRABLE, UNDESIRABLE = 0.7, 1.3, 0.6


def group(prompt: list[int], *responses: list[int], **known: Any) -> Group:
    return Group([Sequence.from_prompt_and_response(prompt, response) for response in responses], **known)


def groups() -> list[Group]:
    """One, two and three responses; labels, scores, and both, where labels win."""
    return [
        group([1, 2], [3, 4], [5], labels=[True, False], id="file:1"),
        group([1, 6], [7, 8, 9], scores=[0.4], id="file:2"),
        group([1, 2, 3], [4], [5, 6], [7, 8], labels=[False, True, False], scores=[1.0, 0.0, 0.0], id="file:3"),
    ]


# By group: what is desirable, and how many mismatched responses follow.
KINDS = [[True, False, None], [False, None], [False, True, False, None]]


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def prepared() -> tuple[kvpref.Batch, kvpref.ResponseLogps, kvpref.ResponseLogps]:
    batch = kvpref.collate(list(KTO().prepare(groups())))
    return batch, random_logps(batch, 1), random_logps(batch, 4)


def ratios_of(policy: kvpref.ResponseLogps, reference: kvpref.ResponseLogps) -> dict[bool | None, list[float]]:
    """Log-ratios of the desirable (True), the undesirable (False) and the mismatched responses (None)."""
    kinds = [kind for row in KINDS for kind in row]
    ratios = [sum(a) - sum(b) for a, b in zip(token_lists(policy), token_lists(reference), strict=True)]
    return {want: [r for r, kind in zip(ratios, kinds, strict=True) if kind is want] for want in (True, False, None)}


def expected_loss(ratios: dict[bool | None, list[float]], point: float) -> float:
    losses = [DESIRABLE * (1 - s(BETA * (r - point))) for r in ratios[True]]
    losses += [UNDESIRABLE * (1 - s(BETA * (point - r))) for r in ratios[False]]
    return sum(losses) / len(losses)


SETTINGS = {"beta": BETA, "desirable_weight": DESIRABLE, "undesirable_weight": UNDESIRABLE}


@pytest.mark.parametrize("sign", [1, -1])
def test_kto_is_equation_7(sign: int) -> None:
    batch, policy, reference = prepared()
    if sign < 0:
        policy, reference = reference, policy
    ratios = ratios_of(policy, reference)
    drift = sum(ratios[None]) / len(ratios[None])
    assert drift * sign > 0.1  # one of the two cases is below 0, where the point is 0
    loss = make_loss("kto", **SETTINGS)
    output = loss(policy, reference, batch)
    assert output.loss.item() == pytest.approx(expected_loss(ratios, max(0.0, drift)), abs=TOLERANCE)
    expected = {
        "kl": max(0.0, drift),
        "rewards/chosen": BETA * sum(ratios[True]) / 2,
        "rewards/rejected": BETA * sum(ratios[False]) / 4,
        "rewards/margins": BETA * (sum(ratios[True]) / 2 - sum(ratios[False]) / 4),
    }
    found = {key: value.item() for key, value in output.metrics.items() if not key.startswith("logps")}
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert (loss.unit, loss.num_units(batch)) == ("sequences", 6)


def test_apo_zero_unpaired_has_no_reference_point() -> None:
    batch = kvpref.collate(groups())
    policy, reference = random_logps(batch, 4), random_logps(batch, 1)
    rows = [sum(a) - sum(b) for a, b in zip(token_lists(policy), token_lists(reference), strict=True)]
    ratios: dict[bool | None, list[float]] = {True: [rows[0], rows[4]], False: [rows[1], rows[2], rows[3], rows[5]]}
    loss = make_loss("apo_zero_unpaired", **SETTINGS)
    assert loss(policy, reference, batch).loss.item() == pytest.approx(expected_loss(ratios, 0.0), abs=TOLERANCE)
    assert loss.num_units(batch) == 6


def test_kto_gradients_are_those_of_finite_differences_but_for_the_mismatched() -> None:
    batch, policy, reference = prepared()
    loss = make_loss("kto", **SETTINGS)(policy, reference, batch).loss
    (found,) = torch.autograd.grad(loss, policy.token_logps)
    flags = policy.per_token(torch.tensor([flag for item in batch.groups for flag in mismatched_flags(item)]))
    assert (found[flags] == 0).all()
    point = make_loss("kto", **SETTINGS)(policy, reference, batch).metrics["kl"]
    constant = policy.token_logps.detach().clone()  # gradcheck moves its input in place

    def with_fixed_point(logps: torch.Tensor) -> torch.Tensor:
        moved = policy._replace(token_logps=torch.where(flags, constant, logps))
        output = make_loss("kto", **SETTINGS)(moved, reference, batch)
        assert output.metrics["kl"] == point
        return output.loss

    assert torch.autograd.gradcheck(with_fixed_point, (policy.token_logps,))


def test_gradient_pulls_desirable_up_and_others_down() -> None:
    batch, policy, reference = prepared()
    make_loss("kto")(policy, reference, batch).loss.backward()
    assert policy.token_logps.grad is not None
    signs = policy.sum_of(policy.token_logps.grad.sign()) / policy.lengths()
    assert signs.tolist() == [{True: -1.0, False: 1.0, None: 0.0}[kind] for row in KINDS for kind in row]


def test_a_threshold_tells_desirable_scores() -> None:
    batch = kvpref.collate([group([1, 2], [3], [4], [5], scores=[1.0, 2.0, 3.0])])
    policy, reference = random_logps(batch, 0), random_logps(batch, 1)
    make_loss("apo_zero_unpaired", score_threshold=2.0)(policy, reference, batch).loss.backward()
    assert policy.token_logps.grad is not None
    signs = policy.sum_of(policy.token_logps.grad.sign()) / policy.lengths()
    assert signs.tolist() == [1.0, 1.0, -1.0]


def test_metrics_of_an_absent_kind_are_left_out() -> None:
    batch = kvpref.collate([group([1, 2], [3], labels=[True])])
    output = make_loss("apo_zero_unpaired")(random_logps(batch, 0), random_logps(batch, 1), batch)
    assert set(output.metrics) == {"kl", "rewards/chosen", "logps/chosen"}


def test_mismatched_responses_are_those_of_other_prompts() -> None:
    found = list(KTO(num_mismatched=2).prepare(groups()))
    assert [item.id for item in found] == ["file:1", "file:2", "file:3"]
    # Prompt of the group; then the responses of the two groups before it, each group's in turn.
    assert [s.input_ids for s in found[0].sequences[2:]] == [(1, 2, 4), (1, 2, 7, 8, 9)]
    assert [s.input_ids for s in found[1].sequences[1:]] == [(1, 6, 5), (1, 6, 5, 6)]
    assert [s.input_ids for s in found[2].sequences[3:]] == [(1, 2, 3, 7, 8, 9), (1, 2, 3, 3, 4)]
    for before, after in zip(groups(), found, strict=True):
        assert after.sequences[: len(before)] == before.sequences
        assert after.columns[MISMATCHED] == [False] * len(before) + [True] * 2
        for sequence in after.sequences[len(before) :]:
            num_prompt = sequence.scored.index(True)
            assert sequence.input_ids[:num_prompt] == before.sequences[0].input_ids[:num_prompt]
            assert all(sequence.scored[num_prompt:])


def test_groups_with_the_same_prompt_do_not_mismatch() -> None:
    same = [group([1, 2], [3], labels=[True]), group([1, 2], [4], labels=[True]), group([5, 6], [7], labels=[False])]
    found = list(KTO().prepare(same))
    assert [item.sequences[-1].input_ids for item in found] == [(1, 2, 7), (1, 2, 7), (5, 6, 4)]
    with pytest.raises(
        kvpref.InputError, match=r"file:9: no mismatched response .* expected 1 groups .* found 0 among 1"
    ):
        list(KTO().prepare([group([1, 2], [3], labels=[True], id="file:9")]))


def test_columns_keep_their_meaning() -> None:
    made = [
        group([1, 2], [3], [4], labels=[True, False], columns={"weight": [0.5, 2.0], "source": "web"}),
        group([5, 6], [7], labels=[True], columns={"weight": [1.0], "source": "book"}),
    ]
    first = next(iter(KTO().prepare(made)))
    assert dict(first.columns) == {"weight": [0.5, 2.0, None], "source": "web", MISMATCHED: [False, False, True]}
    assert first.labels == (True, False, False)


def test_the_trainers_data_set_holds_them_once() -> None:
    dataset = select_groups(PreferenceDataset(groups()), KTO())
    assert dataset is not None
    assert [len(item) for item in dataset] == [3, 2, 4]
    assert [mismatched_flags(item)[-1] for item in dataset] == [True] * 3
    again = select_groups(dataset, KTO())
    assert again is not None
    assert list(again) == list(dataset)


@pytest.mark.parametrize("schedule", ["full", "bounded"])
def test_the_trainer_computes_and_uses_them(tmp_path: Path, schedule: str) -> None:
    args = preference_runs.make_args(str(tmp_path), loss="kto", schedule=schedule, max_steps=8, learning_rate=2.0)
    trainer = kvpref.PreferenceTrainer(
        preference_runs.make_model(), args, train_dataset=preference_runs.make_groups(num_groups=6)
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    # Policy and reference are the same model at first: r and z are 0.
    assert logs[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert logs[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert logs[-1]["loss"] < 0.45
    assert logs[-1]["rewards/margins"] > 0.1


def test_kto_without_mismatched_responses_is_refused() -> None:
    batch = kvpref.collate(groups())
    with pytest.raises(
        kvpref.InputError, match=r"kto needs mismatched responses; pass the groups through `loss.prepare`"
    ):
        make_loss("kto")(random_logps(batch, 0), random_logps(batch, 1), batch)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_what_lacks_a_reference_or_a_label_is_refused(name: str) -> None:
    batch, policy, _ = prepared()
    with pytest.raises(kvpref.InputError, match=f"^{name} needs reference log-probs"):
        make_loss(name)(policy, None, batch)
    unrated = kvpref.collate([group([1, 2], [3], [4], scores=[1.0, None], id="file:7")])
    with pytest.raises(kvpref.InputError, match=f"file:7: response 1 has neither a label nor a score; {name} needs"):
        make_loss(name)(random_logps(unrated, 0), random_logps(unrated, 1), unrated)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("kto", {"beta": 0}, "^kto: beta must be positive; got 0"),
        ("kto", {"desirable_weight": -1}, "^kto: desirable_weight must be 0 or more; got -1"),
        ("apo_zero_unpaired", {"undesirable_weight": None}, "^apo_zero_unpaired: undesirable_weight must be 0 or more"),
        ("kto", {"score_threshold": "high"}, "^kto: score_threshold must be a number; got 'high'"),
        ("kto", {"num_mismatched": 0}, "^kto: num_mismatched must be an integer of at least 1; got 0"),
        ("kto", {"num_mismatched": 1.5}, "^kto: num_mismatched must be an integer of at least 1; got 1.5"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(kvpref.InputError, match=message):
        make_loss(name, **settings)
