"""`kvpref train` on sharded models: resumed, also on another number of ranks, it goes on to the same weights."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line_in_process import run
from preference_runs import make_model
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel
from two_processes import torchrun

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BY_LAUNCHER = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
"""What `accelerate launch` says to each process."""


def write_pairs(path: Path) -> Path:
    generator = random.Random(0)

    def draw(low: int, high: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))

    rows = [
        {"prompt": draw(16, 30), "chosen": f" one {draw(1, 12)}", "rejected": f" two {draw(1, 12)}"} for _ in range(11)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(folder: Path, tokenizer: Path, output: str, *more: object, **settings: Any) -> list[object]:
    """Adam, whose state has to be resumed, too."""
    fixed = {"lr_scheduler_type": "constant", "sort_window_steps": 1, "warmup_steps": 0, "bf16": "false", **settings}
    return [
        *("train", folder / "model", folder / "pairs.jsonl", "--output", folder / output, "--dtype", "auto"),
        *("--tokenizer", tokenizer, "--max-tokens", 120, "--max-steps", 4, "--learning-rate", 0.01),
        *("--logging-steps", 1, "--save-steps", 2, *more),
        *(part for name, value in fixed.items() for part in ("--set", f"{name}={value}")),
    ]


def forget_the_end(output: Path) -> None:
    """Leave of a run what one leaves that was killed before its last checkpoint was whole."""
    (output / "checkpoint-4" / "trainer_state.json").unlink()
    (output / "result.json").unlink()
    (output / "model.safetensors").unlink()


def check_same(folder: Path, names: tuple[str, ...]) -> None:
    expected, start = load_file(folder / "one" / "model.safetensors"), make_model().state_dict()
    for name in names:
        found = load_file(folder / name / "model.safetensors")
        assert found.keys() == expected.keys()
        for weight, value in expected.items():
            # float64 throughout: only the order of sums differs.
            error = (found[weight] - value).norm() / (value - start[weight]).norm().clamp(min=1e-8)
            assert error < 1e-10, f"{name}: {weight}: relative error {error:.2e}"


@pytest.mark.full
@pytest.mark.slow
def test_a_sharded_run_goes_on(tmp_path: Path, tokenizer_dir: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl")
    two = arguments(tmp_path, tokenizer_dir, "two", "--batch-size", 3)
    torchrun("-m", "kvpref", *two, **BY_LAUNCHER)
    checkpoint = tmp_path / "two" / "checkpoint-2"
    assert list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp")), "checkpoints are in pieces"
    assert not list(checkpoint.glob("*.safetensors")) or not (checkpoint / "model.safetensors").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    forget_the_end(tmp_path / "resumed")
    torchrun("-m", "kvpref", "train", "--output", tmp_path / "resumed", "--resume", **BY_LAUNCHER)
    run(*arguments(tmp_path, tokenizer_dir, "one", "--batch-size", 6))
    check_same(tmp_path, ("two", "resumed"))
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "resumed", dtype=torch.float64)
    assert loaded.config.architectures == ["GPT2LMHeadModel"]


@pytest.mark.full
@pytest.mark.slow
def test_four_ranks_go_on_as_two(tmp_path: Path, tokenizer_dir: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl")
    four = arguments(tmp_path, tokenizer_dir, "four", "--batch-size", 2, "--fsdp", schedule="bounded")
    torchrun("-m", "kvpref", *four, num_ranks=4)
    for num_ranks in (2, 4):
        name = f"resumed-{num_ranks}"
        shutil.copytree(tmp_path / "four", tmp_path / name)
        forget_the_end(tmp_path / name)
        torchrun("-m", "kvpref", "train", "--output", tmp_path / name, "--resume", num_ranks=num_ranks)
    run(*arguments(tmp_path, tokenizer_dir, "one", "--batch-size", 8))
    check_same(tmp_path, ("four", "resumed-2", "resumed-4"))
