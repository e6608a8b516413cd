"""Reward models in the trainer: both schedules, evaluation, saving; and mixed precision, for every kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import make_args, make_groups
from tiny_models import tiny_model, tiny_reward_model
from transformers import AutoModelForSequenceClassification

import kvpref


def make_trainer(output: Path, **settings: Any) -> kvpref.PreferenceTrainer:
    model = tiny_reward_model("llama", torch.float64 if not settings.get("bf16") else torch.float32)
    args = make_args(str(output), loss="bradley_terry", learning_rate=0.05, **settings)
    return kvpref.PreferenceTrainer(model, args, train_dataset=make_groups(8), eval_dataset=make_groups(5, seed=3))


@pytest.mark.parametrize("mode", ["two_pass", "padded"])
def test_schedules_and_modes_give_one_model(tmp_path: Path, mode: str) -> None:
    settings = {"mode": mode} if mode == "padded" else {"schedule": "bounded", "max_tokens_per_chunk": 20}
    runs = [make_trainer(tmp_path / "full"), make_trainer(tmp_path / "other", **settings)]
    evaluations = []
    for trainer in runs:
        trainer.train()
        evaluations.append(trainer.evaluate())
    assert evaluations[0]["eval_accuracy"] >= 0
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)  # norms inside the models are float32
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert (one - other).norm() <= 1e-6 * one.norm()


def test_saved_reward_models_are_transformers_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    batch = kvpref.collate(make_groups(3))
    with torch.no_grad():
        rewards = kvpref.response_rewards(trainer.model, batch).rewards
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float64).eval()
    with torch.no_grad():
        own = [loaded(input_ids=torch.tensor([s.input_ids])).logits.item() for s in batch.sequences]
    assert rewards.tolist() == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("schedule", ["full", "bounded"])
@pytest.mark.parametrize("kind", ["language", "reward"])
@pytest.mark.usefixtures("own_precision")
def test_bf16_autocast_of_a_float32_model(tmp_path: Path, kind: str, schedule: str) -> None:
    """Accelerate wraps the model's forward for it."""
    model = tiny_model("llama") if kind == "language" else tiny_reward_model("llama")
    loss = "dpo" if kind == "language" else "bradley_terry"
    before = [parameter.detach().clone() for parameter in model.parameters()]
    args = make_args(str(tmp_path), loss=loss, bf16=True, schedule=schedule, learning_rate=0.05)
    trainer = kvpref.PreferenceTrainer(model, args, train_dataset=make_groups(6), eval_dataset=make_groups(4))
    assert trainer.train().training_loss == pytest.approx(0.69, abs=0.3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.69, abs=0.5)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not torch.is_autocast_enabled("cpu"), "an autocast that was entered twice stays on"


def test_a_reward_that_is_not_finite_is_told_with_its_group(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.score.weight.fill_(torch.nan)
    with pytest.raises(kvpref.RunError, match=r"the rewards of made:.* are not finite"):
        trainer.train()
