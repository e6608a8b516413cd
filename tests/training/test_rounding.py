"""Weights of 16 bits that cannot follow a learning rate."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from preference_runs import make_args, make_groups, make_model
from torch import nn

import kvpref
from kvpref.training.rounding import lost_share


def train(output: Path, model: Any, **settings: Any) -> tuple[float, list[str]]:
    """The share of the weights that ten steps of training changed, and the warnings about it."""
    settings = {
        "loss": "sft",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_steps": 10,
        "warmup_steps": 0,
        **settings,
    }
    args = make_args(str(output), **settings)
    start = [item.detach().clone() for item in model.parameters() if item.requires_grad]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = kvpref.PreferenceTrainer(model, args, make_groups(6))
    trainer.train()
    trained = [item for item in model.parameters() if item.requires_grad]
    num_changed = sum(int((now != before).sum()) for now, before in zip(trained, start, strict=True))
    said = [str(item.message) for item in caught if "rounded away" in str(item.message)]
    return num_changed / sum(item.numel() for item in trained), said


def test_bf16_weights_that_stay_as_they_are_are_told_of(tmp_path: Path) -> None:
    model = make_model().to(torch.bfloat16)
    expected = lost_share(model, 5e-7)
    changed, said = train(tmp_path, model, learning_rate=5e-7)
    assert expected > 0.9
    assert changed < 2 * (1 - expected) + 0.01
    (message,) = said
    assert message.startswith(f"{expected:.1%} of the trained weights are too large, in bfloat16, for a step of")
    assert "the learning rate 5e-07" in message
    assert "--dtype float32" in message


def test_float32_weights_follow(tmp_path: Path) -> None:
    changed, said = train(tmp_path, make_model().float(), learning_rate=5e-7)
    assert changed > 0.9
    assert not said


def test_the_default_learning_rate_is_judged(tmp_path: Path) -> None:
    assert train(tmp_path, make_model().to(torch.bfloat16), loss="dpo", learning_rate=None, max_steps=1)[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-2},  # large enough for most weights
        {"learning_rate": 5e-7, "optim": "sgd"},  # its steps have the gradient's size
        {"learning_rate": 0.0},
    ],
)
def test_nothing_is_said_where_nothing_is_known_to_be_lost(settings: dict[str, Any], tmp_path: Path) -> None:
    assert train(tmp_path, make_model().to(torch.bfloat16), max_steps=1, **settings)[1] == []


def test_an_adapter_in_float32_on_a_frozen_bf16_model_is_right(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(make_model().to(torch.bfloat16), config)
    assert {item.dtype for item in model.parameters() if item.requires_grad} == {torch.float32}
    assert train(tmp_path, model, learning_rate=5e-6, max_steps=1)[1] == []


@pytest.mark.parametrize(
    ("weight", "step", "is_lost"),
    [
        # bfloat16 keeps 8 bits: above 1 its numbers are 2^-7 apart, below 1 2^-8; half of that rounds to even.
        (1.0, 2**-10, True),
        (1.0, 2**-8, False),  # down is a step that can be taken
        (1.5, 2**-9, True),
        (1.5, 2**-7, False),
        (0.0, 1e-7, False),
    ],
)
def test_what_a_step_can_move(weight: float, step: float, is_lost: bool) -> None:
    model = nn.Linear(1, 3, bias=False)
    nn.init.constant_(model.weight, weight)
    assert lost_share(model, step) == 0.0
    assert lost_share(model.to(torch.bfloat16), step) == is_lost
