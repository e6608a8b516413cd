"""Names read from sources are those of the classes, in whatever version of transformers is installed."""

from __future__ import annotations

from dataclasses import fields

import pytest
from transformers import SchedulerType
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from kvpref.cli.declared_names import loss_settings, losses, training_arguments, values_of
from kvpref.losses import LOSSES
from kvpref.losses.user import settings_of
from kvpref.training import PreferenceTrainingArguments


def test_training_arguments_are_the_fields_of_their_class() -> None:
    own = {item.name for item in fields(PreferenceTrainingArguments) if item.init}
    assert training_arguments().keys() == own
    assert {"loss", "mode", "learning_rate", "max_steps", "bf16"} <= own
    # The nearest declaration counts: kvpref's argument, not the one that it takes the place of.
    assert training_arguments()["learning_rate"] == "float | None"


def test_enumerations_have_the_values_of_their_members() -> None:
    expected = {"lr_scheduler_type": SchedulerType, "optim": OptimizerNames, "eval_strategy": IntervalStrategy}
    for name, kind in expected.items():
        assert values_of(name) == tuple(member.value for member in kind), name
    assert values_of("learning_rate") == values_of("no_such") == ()


def test_losses_are_those_of_the_registry() -> None:
    assert list(losses()) == list(LOSSES)
    assert {name: kind for name, (_, kind) in losses().items()} == {n: kind.__name__ for n, kind in LOSSES.items()}


@pytest.mark.parametrize("name", LOSSES)
def test_settings_of_a_loss_are_its_fields(name: str) -> None:
    assert set(loss_settings(name)) == {item.name for item in settings_of(LOSSES[name])}
