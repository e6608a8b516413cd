"""Reward models: kvpref's trainer against TRL's, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

import trl_runs  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

from kvpref.integrations import trl as kvpref_trl  # noqa: E402


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trl_runs.save_model(tmp_path_factory.mktemp("model"))


def make_trainer(trainer_class: Any, path: str, output: Path, setup: dict[str, Any]) -> Any:
    setup = dict(setup)
    arguments = {name.lower(): setup.pop(name) for name in list(setup) if name.isupper()}
    tokenizer, data = trl_runs.make_tokenizer(), trl_runs.pairs()
    if arguments.pop("pads_with_eos", False):
        tokenizer.pad_token = tokenizer.eos_token
    if arguments.pop("with_margin", False):
        data = data.add_column("margin", [0.1 * index for index in range(len(data))])
    torch.manual_seed(0)  # for the scalar head
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    return trainer_class(
        model=model,
        args=trl_runs.make_args(trl.RewardConfig, output, **setup),
        train_dataset=data,
        eval_dataset=data.select(range(6)),
        processing_class=tokenizer,
        **arguments,
    )


SETUPS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "margin": {"WITH_MARGIN": True},
    "centering": {"center_rewards_coefficient": 0.1},
    "padding is the end token": {"PADS_WITH_EOS": True},
    "padded to a multiple": {"pad_to_multiple_of": 16},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 5},
    "LoRA": {
        "PEFT_CONFIG": peft.LoraConfig(
            task_type="SEQ_CLS", r=3, target_modules=["q_proj", "down_proj"], modules_to_save=["score"]
        )
    },
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", SETUPS)
def test_every_option_gives_trls_numbers(name: str, model_path: str, tmp_path: Path) -> None:
    truth = trl_runs.run(make_trainer(trl.RewardTrainer, model_path, tmp_path, SETUPS[name]))
    found = trl_runs.run(make_trainer(kvpref_trl.RewardTrainer, model_path, tmp_path, SETUPS[name]))
    trl_runs.assert_same(found, truth)
    assert found.num_layer_tokens < 0.8 * truth.num_layer_tokens
