"""DPO: kvpref's trainer against TRL's, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import trl_runs  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from kvpref.integrations import trl as kvpref_trl  # noqa: E402


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trl_runs.save_model(tmp_path_factory.mktemp("model"))


def make_args(output: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": trl_runs.NUM_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "beta": 0.5,
    }
    return trl.DPOConfig(**{**settings, **options})


def train(trainer_class: Any, path: str, output: Path, *, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(path),
        args=make_args(output, **options),
        train_dataset=trl_runs.pairs(),
        processing_class=trl_runs.make_tokenizer(),
        **(arguments or {}),
    )
    return trl_runs.run(trainer)


OPTIONS: dict[str, dict[str, Any]] = {"sigmoid": {}}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_trls_numbers(name: str, model_path: str, tmp_path: Path) -> None:
    truth = train(trl.DPOTrainer, model_path, tmp_path, **OPTIONS[name])
    found = train(kvpref_trl.DPOTrainer, model_path, tmp_path, **OPTIONS[name])
    trl_runs.assert_same(found, truth)
    assert found.num_layer_tokens < 0.75 * truth.num_layer_tokens
