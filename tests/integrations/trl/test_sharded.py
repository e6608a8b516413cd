"""With FSDP2 and DeepSpeed the trainers do what they do with whole weights, also where ranks differ in passes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

import trl_runs
import trl_vision_runs
from deepspeed_runs import needs_deepspeed
from tiny_models import tiny_model
from two_processes import run_two_processes

WORKER = Path(__file__).with_name("trl_sharded_worker.py")
CASES = (
    "DPO",
    "DPO, LoRA",
    "GRPO",
    "KTO",
    "reward model",
    "DPO, one pass",
    "DPO, LoRA, packed",
    "DPO, precomputed",
    "DPO, weights not resharded",
    "KTO, LoRA",
    "reward model, LoRA",
    "GRPO, LoRA",
    "GRPO, one pass",
    "DPO, images",
    "asynchronous GRPO",
)
SAME_NUMBER_OF_PASSES = {"DPO, one pass", "DPO, LoRA, packed", "GRPO, one pass", "DPO, images"}


def run(sharding: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """Weights and losses are those of whole weights."""
    path = trl_runs.save_model(tmp_path / "model")
    if "DPO, images" in names:
        trl_vision_runs.save_model("qwen2_5_vl", Path(path, "qwen2_5_vl"))
    if "asynchronous GRPO" in names:
        tiny_model("llama", torch.float64).save_pretrained(Path(path, "float64"))
    run_two_processes(WORKER, sharding, path, tmp_path, *names)
    first, second = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(2))
    for name in names:
        assert (first[name]["num_passes"] == second[name]["num_passes"]) == (name in SAME_NUMBER_OF_PASSES), name
        for found in (first[name], second[name]):
            check(name, found)
    if "bf16" in first:  # policy and reference are equal at first; log 2 rounded to bf16 is another number
        assert first["bf16"][0] == pytest.approx(math.log(2), abs=1e-6)


def check(name: str, found: dict[str, Any]) -> None:
    assert found["moved"] > 0.1, name  # or equal weights would say nothing
    assert found["apart"] < 1e-10 * found["moved"], name
    assert found["losses"] == pytest.approx(found["true_losses"], rel=1e-10, abs=1e-10), name
    if "trl_losses" in found:
        assert found["losses"] == pytest.approx(found["trl_losses"], rel=1e-5, abs=1e-5), name


@pytest.mark.full
@pytest.mark.slow
def test_fsdp2(tmp_path: Path) -> None:
    run("fsdp2", CASES[:3], tmp_path)


@needs_deepspeed
@pytest.mark.slow
def test_zero_3(tmp_path: Path) -> None:
    run("zero3", ("DPO, LoRA", "reward model"), tmp_path)


@pytest.mark.full
def test_more_of_fsdp2(tmp_path: Path) -> None:
    run("fsdp2", CASES[3:], tmp_path)


@needs_deepspeed
@pytest.mark.full
@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_more_of_deepspeed(sharding: str, tmp_path: Path) -> None:
    run(sharding, CASES, tmp_path)
