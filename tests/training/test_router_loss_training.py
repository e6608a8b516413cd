"""The trainer on a mixture of experts: its load-balancing loss is added, reported, and not left out in silence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import make_args, make_groups
from tiny_experts import known_families, tiny_experts

import kvpref


@pytest.fixture(autouse=True)
def _known_families() -> Iterator[None]:
    with known_families():
        yield


def train(output: Path, **overrides: Any) -> kvpref.PreferenceTrainer:
    options = {"max_steps": 2, "logging_steps": 1, "max_tokens_per_micro_batch": None, **overrides}
    args = make_args(str(output), **options)
    trainer = kvpref.PreferenceTrainer(tiny_experts("mixtral"), args, train_dataset=make_groups(8))
    trainer.train()
    return trainer


def weights(trainer: kvpref.PreferenceTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logged(trainer: kvpref.PreferenceTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_the_loss_is_added_and_reported_in_both_schedules(tmp_path: Path) -> None:
    without = train(tmp_path / "without")
    full = train(tmp_path / "full", router_aux_loss_coef=0.5)
    bounded = train(tmp_path / "bounded", router_aux_loss_coef=0.5, schedule="bounded", max_tokens_per_chunk=16)
    # transformers keeps some sums in float32, so the trainings agree to its rounding
    torch.testing.assert_close(weights(bounded), weights(full), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights(without), weights(full), rtol=1e-5, atol=1e-6)
    (first, _), (first_without, _) = logged(full, "loss"), logged(without, "loss")
    assert logged(full, "router_aux_loss") == pytest.approx(logged(bounded, "router_aux_loss"), rel=1e-4)
    assert first == pytest.approx(first_without + 0.5 * logged(full, "router_aux_loss")[0], abs=1e-3)
    assert not logged(without, "router_aux_loss")


def test_a_config_that_asks_for_the_loss_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_experts("mixtral", output_router_logits=True, router_aux_loss_coef=0.02)
    args = make_args(str(tmp_path), max_steps=1)
    kvpref.PreferenceTrainer(model, args, train_dataset=make_groups(4)).train()
    assert "kvpref adds it with router_aux_loss_coef=0.02 only" in capsys.readouterr().err
