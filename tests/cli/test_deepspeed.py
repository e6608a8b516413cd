"""`kvpref train` with DeepSpeed, as users start it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command_line_in_process import run
from deepspeed_runs import deepspeed_config, needs_deepspeed
from preference_runs import make_model
from safetensors.torch import load_file
from two_processes import torchrun

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def arguments(model: Path, data: Path, output: Path, *options: object) -> list[object]:
    fixed = ("optim=sgd", "lr_scheduler_type=constant", "max_grad_norm=0.0", "sort_window_steps=1", "warmup_steps=0")
    return [
        *("train", model, data, "--output", output, "--max-tokens", 80, "--max-steps", 2, "--learning-rate", 0.5),
        *("--logging-steps", 1, *(part for setting in fixed for part in ("--set", setting)), *options),
    ]


def losses_of(output: Path) -> list[float]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@needs_deepspeed
@pytest.mark.full
def test_zero_3_gives_what_one_process_gives(tmp_path: Path, tokenizer_dir: Path, pairs_file: Path) -> None:
    model, config = tmp_path / "model", tmp_path / "zero3.json"
    make_model().float().save_pretrained(model)
    config.write_text(json.dumps(deepspeed_config(3)))
    tokenizer = ("--tokenizer", tokenizer_dir)
    options = (*tokenizer, "--batch-size", 3, "--set", f"deepspeed={config}", "--schedule", "bounded")
    torchrun("-m", "kvpref", *arguments(model, pairs_file, tmp_path / "two", *options))
    run(*arguments(model, pairs_file, tmp_path / "one", *tokenizer, "--batch-size", 6))
    found, expected = losses_of(tmp_path / "two"), losses_of(tmp_path / "one")
    # Policy and reference are one model.
    assert found[0] == pytest.approx(math.log(2), rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-5)  # float32
    before, saved, own = (
        load_file(folder / "model.safetensors") for folder in (model, tmp_path / "two", tmp_path / "one")
    )
    assert saved.keys() == own.keys()
    for name, weight in own.items():
        update = weight - before[name]
        # float32 weights of order one, whose update is 1e-3 of them or less.
        assert (saved[name] - weight).norm() <= 1e-6 * weight.norm() + 1e-3 * update.norm(), name
