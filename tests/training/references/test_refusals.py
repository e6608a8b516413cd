"""References that are refused: what does not fit the policy, the data or the way it is sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from preference_runs import make_args, make_groups, make_model
from reference_runs import make_trainer
from torch import nn
from transformers import GPT2LMHeadModel

import kvpref


def small_vocabulary() -> nn.Module:
    model = make_model(seed=5)
    model.resize_token_embeddings(40)
    return model


def short_positions() -> nn.Module:
    model = make_model(seed=5)
    model.config.max_position_embeddings = 20
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "old"}, "unknown reference 'old'; choose from: start, base"),
        ({"reference_sync_alpha": 0.0}, r"must be in \(0, 1\]; got 0"),
        ({"reference_sync_steps": 5}, "set precompute_reference=False"),
        ({"reference_sync_steps": 0, "precompute_reference": False}, "at least 1"),
        ({"reference_device": "cpu"}, "for a second model"),
        ({"reference_model": "no/such/folder/anywhere"}, "no/such/folder/anywhere: cannot load"),
        ({"backend": "cuda_flash"}, "'cuda_flash' cannot run here: .*; these can: cpu_flash"),
        (
            {"backend": "cpu_flash", "reference_model": make_model, "reference_device": "meta"},
            "reference_device meta: attention backend 'cpu_flash' cannot run here: .*; backend auto serves both",
        ),
        ({"loss": "sft", "reference_model": make_model}, "'SFT' reads no reference"),
        ({"reference": "base", "reference_model": make_model}, "adapter switched off"),
        (
            {"reference_model": small_vocabulary},
            r"made:\d+: token \d+ is not in the reference model's vocabulary of 40",
        ),
        ({"reference_model": short_positions}, r"made:\d+: a sequence of \d+ tokens"),
        (
            {"reference_model": small_vocabulary, "reference_sync_steps": 1, "precompute_reference": False},
            r"wte.weight is \(61, 32\) in the policy and \(40, 32\)",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    with pytest.raises(kvpref.InputError, match=message):
        make_trainer(tmp_path, **settings).train()


def test_two_second_models_are_refused(tmp_path: Path) -> None:
    args = make_args(str(tmp_path), reference_model="somewhere")
    with pytest.raises(kvpref.InputError, match="two reference models"):
        kvpref.PreferenceTrainer(make_model(), args, train_dataset=make_groups(), reference_model=make_model())


def test_a_reference_that_shares_weights_with_the_policy_is_refused(tmp_path: Path) -> None:
    model, other = make_model(), make_model(seed=5)
    other.transformer.wpe = model.transformer.wpe
    for reference in (model, other):
        with pytest.raises(kvpref.InputError, match="shares weights"):
            make_trainer(tmp_path, model, reference_model=reference).train()


def test_sync_of_a_sharded_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpref.parallel.sharding.FSDPModule", GPT2LMHeadModel)
    with pytest.raises(kvpref.InputError, match=r"whole weights.*FSDP"):
        make_trainer(tmp_path, precompute_reference=False, reference_sync_steps=1)
