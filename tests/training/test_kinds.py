"""Arguments of a wrong kind: one message that says what to pass instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import make_args, make_groups, make_model
from torch import nn
from transformers import TrainingArguments

import kvpref
from kvpref.losses import DPO

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt2"}, "model must be a model that was loaded; got 'gpt2'. Load it with AutoModelForCausalLM"),
    ({"model": None}, "model must be a model that was loaded; got NoneType"),
    ({"model": nn.Linear(2, 2)}, "expected a transformers PreTrainedModel"),
    ({"model": nn.DataParallel(make_model())}, "pass model.module, and start one process per device"),
    ({"model": torch.compile(make_model())}, "before torch.compile, and set torch_compile=True"),
    ({"args": None}, "args must be kvpref.PreferenceTrainingArguments; got NoneType"),
    ({"args": {"loss": "dpo"}}, "args must be kvpref.PreferenceTrainingArguments; got dict"),
    ({"args": TrainingArguments(use_cpu=True)}, "got TrainingArguments. It takes all of transformers'"),
    ({"loss": "dpo"}, "Name it in PreferenceTrainingArguments(loss='dpo')"),
    ({"loss": "mine"}, "Name it in PreferenceTrainingArguments(loss='file.py:function')"),
    ({"loss": DPO}, "loss is the class DPO; make it, with its settings: DPO()"),
    ({"loss": 0.1}, "loss must be a function (policy, reference, batch); got float"),
    ({"reference_model": "gpt2"}, "Load it, or name it in PreferenceTrainingArguments"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_of_another_kind(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"model": make_model(), "args": make_args(str(tmp_path)), "train_dataset": make_groups(2), **wrong}
    with pytest.raises(kvpref.InputError) as error:
        kvpref.PreferenceTrainer(**given)
    assert message in str(error.value)


def test_a_model_that_was_attached_before(tmp_path: Path) -> None:
    args = make_args(str(tmp_path), max_steps=1)
    kvpref.PreferenceTrainer(kvpref.attach(make_model()), args, train_dataset=make_groups(2)).train()
