"""Runs through DeepSpeed give what one process gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_runs import (
    ADAPTER_OFF,
    ADAPTER_OFF_SETTINGS,
    ALL_CASES,
    CASES,
    Case,
    make_trainer,
    moved_trainer,
    needs_deepspeed,
    outcome,
    second_model_trainer,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from two_processes import run_two_processes

from kvpref import UnsupportedModelError
from kvpref.parallel.deepspeed_limits import check_config

WORKER = Path(__file__).with_name("deepspeed_worker.py")


def assert_same(case: Case, output: Path, num_ranks: int, num_steps: int, **settings: Any) -> None:
    found = torch.load(output / f"{case.name}.pt")
    folder = output / f"one-{case.name}"
    expected = outcome(make_trainer(case, folder, num_ranks, deepspeed=False, num_steps=num_steps, **settings))
    assert len(expected["losses"]) >= num_steps
    # The trainer logs sums of float32 losses.
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    moved = 0.0
    for name, weight in expected["after"].items():
        start = expected["before"][name]
        assert torch.equal(found["before"][name], start), name
        update, own = weight - start, found["after"][name] - start
        # float64 throughout: only the order of sums differs.
        assert (own - update).norm() <= 1e-10 * update.norm().clamp(min=1e-8), (case.name, name)
        moved = max(moved, update.abs().max().item())
    assert moved > 1e-3, "weights must move"


def assert_facts(output: Path) -> None:
    facts = torch.load(output / "facts.pt")
    assert set(facts["pieces"]) == {0}, "no rank may hold a whole weight"
    assert "float64" in facts["float64"]
    for name, loss in facts.items():
        if name.startswith("first loss"):
            # Policy and reference are one model; in bf16 rows that are packed otherwise are rounded otherwise.
            assert loss == pytest.approx(math.log(2), abs=1e-6 if name.endswith("False") else 1e-4), name
    second = outcome(second_model_trainer(output, 1))["losses"]
    assert facts["second model"] == pytest.approx(second, rel=1e-5)  # float32
    assert abs(second[0] - math.log(2)) > 1e-3, "the reference must be another model"
    whole, resumed = facts["whole"]["after"], facts["resumed"]["after"]
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
    assert facts["resumed"]["losses"] == facts["whole"]["losses"]
    saved = load_file(output / "saved" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(output / "saved", dtype=torch.float64)
    assert saved.keys() <= loaded.state_dict().keys()
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, whole[name]), name


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_matches_one_process(tmp_path: Path) -> None:
    run_two_processes(WORKER, tmp_path, "some", 3)
    assert_facts(tmp_path)
    for case in CASES:
        assert_same(case, tmp_path, 2, 3)
    assert_same(ADAPTER_OFF, tmp_path, 2, 3, **ADAPTER_OFF_SETTINGS)


@needs_deepspeed
@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_stage_and_schedule(tmp_path: Path, num_ranks: int) -> None:
    run_two_processes(WORKER, tmp_path, "all", 20, num_ranks=num_ranks)
    for case in ALL_CASES:
        assert_same(case, tmp_path, num_ranks, 20)


@needs_deepspeed
@pytest.mark.full
def test_another_number_of_ranks(tmp_path: Path) -> None:
    run_two_processes(WORKER, tmp_path, "save", num_ranks=4)
    run_two_processes(WORKER, tmp_path, "resume")
    expected = outcome(moved_trainer(tmp_path / "one", 1, 4))["losses"]
    for stage in (1, 2):
        # float32; with Adam's averages lost, the last loss is off by 1e-3.
        assert torch.load(tmp_path / f"moved-{stage}.pt") == pytest.approx(expected, rel=1e-5)
    assert "was written by 4 ranks, and this run has 2" in torch.load(tmp_path / "moved-3.pt")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "zero_optimization.stage=0"),
        ({"zero_optimization": {"stage": 0}}, "DistributedDataParallel"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "fp16.enabled=True"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "ZeRO\\+\\+"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device='nvme'"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "OneBitAdam"}}, "OneBitAdam.*AdamW"),
        ({"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}, "autotp_size=2"),
    ],
)
def test_what_does_not_go_with_kvpref(config: dict[str, object], expected: str) -> None:
    with pytest.raises(UnsupportedModelError, match=expected):
        check_config(config)


def test_what_is_left_to_the_arguments() -> None:
    check_config({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}, "fp16": {"enabled": "auto"}})
