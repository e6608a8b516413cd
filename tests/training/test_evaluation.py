"""What needs evaluations is refused before training where there are none, or where they do not give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import make_args, make_groups, make_model

import kvpref
from kvpref import InputError
from kvpref.losses import LOSSES, make_loss
from kvpref.training.evaluation import check_best_metric

BEST = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
}


def make_trainer(path: Path, eval_dataset: Any = None, loss_function: Any = None, **settings: Any) -> Any:
    return kvpref.PreferenceTrainer(
        make_model(),
        make_args(str(path), **settings),
        train_dataset=make_groups(3),
        eval_dataset=eval_dataset,
        loss=loss_function,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (BEST, "load_best_model_at_end needs evaluation data"),
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch' needs evaluation data"),
        ({"eval_on_start": True}, "eval_on_start needs evaluation data"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy='best' saves after evaluations"),
    ],
)
def test_without_eval_data(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, **settings)


def test_without_eval_lines(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the eval data has no groups"):
        make_trainer(tmp_path, [], **BEST)


def test_a_metric_that_no_evaluation_gives(tmp_path: Path) -> None:
    message = (
        "'eval_accuracy' is not reported by evaluations of the loss dpo; choose from: eval_logps/chosen, .*eval_loss"
    )
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, make_groups(3), **BEST, metric_for_best_model="eval_accuracy")


@pytest.mark.parametrize("metric", ["rewards/accuracies", "eval_rewards/margins", "loss", "eval_loss"])
def test_metrics_that_evaluations_give(metric: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_groups(3), **BEST, metric_for_best_model=metric)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mixture"])
def test_the_metrics_of_every_loss_are_found(name: str) -> None:
    """Without a model: what `check_best_metric` says of a wrong name lists what the loss logs."""
    groups = [kvpref.Group(g.sequences, scores=[1.0, 0.0], labels=g.labels, id=g.id) for g in make_groups(4)]
    loss = make_loss(name)
    prepared = kvpref.data.PreferenceDataset(list(loss.prepare(groups)))
    args = make_args("unused", metric_for_best_model="nothing")
    with pytest.raises(InputError, match="choose from: eval_"):
        check_best_metric(args, prepared, loss, 8)


def test_a_loss_that_takes_no_made_up_values_is_let_through(tmp_path: Path) -> None:
    def picky(policy: Any, reference: Any, batch: Any) -> kvpref.LossOutput:
        if not policy.token_logps.any():
            raise AssertionError("these are no log-probs")
        return kvpref.LossOutput(policy.token_logps.mean(), {"mine": torch.zeros(())})

    make_trainer(tmp_path, make_groups(3), picky, **BEST, metric_for_best_model="mine")
