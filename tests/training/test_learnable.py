"""Data in which nothing can be learned stops before training; otherwise what counts is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from preference_runs import make_args, make_groups, make_model
from tiny_models import tiny_reward_model

import kvpref
from kvpref import Group, InputError
from kvpref.losses import PreferenceLoss, make_loss
from kvpref.training.references import References

TIE, GOOD = [1.0, 1.0], [0.0, 1.0]
REWARD_LOSSES = ("bradley_terry", "plackett_luce_reward")


def data(*scores: list[float | None], columns: dict[str, Any] | None = None) -> list[Group]:
    groups = make_groups(len(scores))
    return [
        Group(group.sequences, scores=own, id=group.id, columns=columns)
        for group, own in zip(groups, scores, strict=True)
    ]


ALONE = Group(make_groups(1)[0].sequences[:1], scores=[1.0], id="alone")


def make_trainer(path: Path, train: Any, loss: str, eval_dataset: Any = None, **settings: Any) -> Any:
    model = tiny_reward_model("llama") if loss in REWARD_LOSSES else make_model()
    args = make_args(str(path), loss=loss, loss_args=settings)
    return kvpref.PreferenceTrainer(model, args, train_dataset=train, eval_dataset=eval_dataset)


IDLE = {
    **{name: ({}, data(TIE, TIE)) for name in (*REWARD_LOSSES, "all_pairs", "best_vs_rest", "plackett_luce", "lipo")},
    **{name: ({}, data(TIE, TIE)) for name in ("grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo")},
}
OTHERS = [
    ("dapo", {"dynamic_sampling": True, "beta": 0.1}, data(TIE, TIE), "no two responses have different scores"),
    ("all_pairs", {}, data([None, 1.0], [2.0, None]), "no two responses have different scores"),
    ("grpo", {}, [ALONE], "in all 1 groups no two responses have different scores; give each prompt"),
    ("grpo", {"advantages": "gain"}, data(GOOD, GOOD, columns={"gain": [0, 0.0]}), "all advantages are 0"),
    ("weighted_sft", {}, data([0.0, 0.0]), "all weights are 0; give at least one response a weight above 0"),
    (
        "mixture",
        {"weights": {"all_pairs": 1.0, "plackett_luce": 1.0}},
        data(TIE),
        "no two responses have different scores",
    ),
]
CASES = [
    *((name, *case, "no two responses have different scores; give each prompt") for name, case in IDLE.items()),
    *OTHERS,
]


@pytest.mark.parametrize(("loss", "settings", "groups", "message"), CASES, ids=[str(case[:2]) for case in CASES])
def test_nothing_to_learn_stops_before_the_reference_pass(
    loss: str,
    settings: dict[str, Any],
    groups: list[Group],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(References, "prepare", lambda *args: pytest.fail("the reference pass began"))
    with pytest.raises(InputError, match=message) as error:
        make_trainer(tmp_path, groups, loss, **settings).train()
    assert f"the train data has nothing to learn for the loss {loss}: in all {len(groups)} groups" in str(error.value)


def test_data_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the train data has no groups"):
        make_trainer(tmp_path, [], "sft")


def test_the_same_for_eval_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the eval data has nothing to learn for the loss all_pairs"):
        make_trainer(tmp_path, data(GOOD), "all_pairs", data(TIE))
    trainer = make_trainer(tmp_path, data(GOOD), "all_pairs")
    with pytest.raises(InputError, match="the eval data has nothing to learn"):
        trainer.evaluate(data(TIE))


@pytest.mark.parametrize(
    ("loss", "settings", "groups", "line"),
    [
        ("bradley_terry", {}, data(GOOD, TIE, GOOD), "2 of 3 groups count for the loss bradley_terry; in the others"),
        (
            "grpo",
            {},
            data(GOOD, TIE, TIE),
            "1 of 3 groups count for the loss grpo; in the others no two responses have different scores",
        ),
        ("grpo", {"beta": 0.1}, data(TIE, TIE), "2 of 2 groups count for the loss grpo"),  # the KL term
        ("grpo", {"entropy_coef": 0.1}, data(TIE, TIE), "2 of 2 groups count for the loss grpo"),
        ("weighted_sft", {}, data([0.0, 0.0], GOOD), "1 of 2 groups count for the loss weighted_sft"),
        ("mixture", {"weights": {"all_pairs": 1.0, "sft": 1.0}}, data(TIE), "1 of 1 groups count for the loss mixture"),
        (
            "sft",
            {},
            data([0.0, 0.0], GOOD, [0.0, -1.0]),
            "3 of 3 groups count for the loss sft; in 2 of those that count no response is labelled true or scored",
        ),
        ("dpo", {}, make_groups(3), "3 of 3 groups count for the loss dpo"),
        ("kto", {}, make_groups(3), "3 of 3 groups count for the loss kto"),
    ],
)
def test_how_many_groups_count(
    loss: str,
    settings: dict[str, Any],
    groups: list[Group],
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_trainer(tmp_path, groups, loss, groups, **settings)
    lines = [found for found in capsys.readouterr().err.splitlines() if " data: " in found]
    assert [found.partition(": ")[0] for found in lines] == ["train data", "eval data"]
    assert all(found.partition(": ")[2].startswith(line) for found in lines), lines


class CountsLongResponses(PreferenceLoss):
    """A user's loss that counts by batch, as losses were written before there was `group_units`."""

    def num_units(self, batch: kvpref.Batch) -> int:
        return sum(len(sequence) > 40 for sequence in batch.sequences)


def test_a_loss_that_counts_by_batch() -> None:
    loss, groups = CountsLongResponses(), make_groups(30)
    assert loss.can_be_idle
    idle = [loss.idle(group) is not None for group in groups]
    assert idle == [all(len(sequence) <= 40 for sequence in group.sequences) for group in groups]
    assert any(idle)
    assert not all(idle)


def test_only_losses_with_units_of_their_own_are_looked_into() -> None:
    assert not make_loss("dpo").can_be_idle
    assert not kvpref.losses.as_loss(lambda policy, reference, batch: None).can_be_idle
