"""DPO and reward models from the command line: experts, windows, sinks, states and chunks, in both schedules."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line_in_process import fail, run
from pairwise import pairwise

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FAMILIES = ("qwen3_moe", "gemma3_text", "gpt_oss", "qwen3_next", "llama4_text")
SCHEDULES = {"full": (), "bounded": ("--schedule", "bounded", "--max-tokens-per-chunk", 16)}
STEPS = ("--max-steps", 1, "--batch-size", 2, "--learning-rate", 1e-3, "--set", "use_cpu=true")


@pytest.fixture
def config_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from census_models import tiny_config

    def write(family: str) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(tiny_config(family).to_dict()))
        return path

    return write


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("family", "loss", "schedule"), pairwise(FAMILIES, ("dpo", "bradley_terry"), tuple(SCHEDULES)))
def test_training(
    family: str, loss: str, schedule: str, config_of: Any, tokenizer_dir: Path, pairs_file: Path, tmp_path: Path
) -> None:
    if (family, loss) == ("llama4_text", "bradley_terry"):
        pytest.skip("transformers has no reward model of Llama 4")
    output = tmp_path / "out"
    arguments = ("train", "--model-config", config_of(family), pairs_file, "--tokenizer", tokenizer_dir)
    run(*arguments, "--output", output, "--loss", loss, *SCHEDULES[schedule], *STEPS)
    metrics = json.loads((output / "result.json").read_text())["metrics"]
    assert math.isfinite(metrics["train_loss"])
    assert (output / "model.safetensors").is_file()


def test_there_is_no_reward_model_of_llama_4(
    config_of: Any, tokenizer_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("train", "--model-config", config_of("llama4_text"), "--tokenizer", tokenizer_dir, pairs_file)
    error = fail(capsys, *arguments, "--output", tmp_path / "out", "--loss", "bradley_terry", *STEPS)
    assert "llama4_text" in error
