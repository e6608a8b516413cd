"""Runs whose ranks share micro-batches give what one process gives, and count each group once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from image_runs import train_with_images
from preference_runs import make_args
from split_runs import RUNS, train
from two_processes import run_two_processes

import kvpref
from kvpref.training.argument_checks import check_sequence_parallel

WORKER = Path(__file__).with_name("sequence_worker.py")
# float64 throughout: only the order of sums differs.
TOLERANCE = 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "names"),
    [(4, ["full", "bounded", "sharded"]), pytest.param(2, list(RUNS), marks=pytest.mark.full)],
)
def test_training_matches_one_process(tmp_path: Path, num_ranks: int, names: list[str]) -> None:
    run_two_processes(WORKER, tmp_path, 2, *names, num_ranks=num_ranks)
    for name in names:
        assert_same(torch.load(tmp_path / f"{name}.pt", weights_only=False), train(name, str(tmp_path), 1))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, weight in expected["weights"].items():
        error = (found["weights"][name] - weight).norm() / weight.norm()
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"
    assert len(found["logs"]) == len(expected["logs"]) > 1
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6), "what is logged is float32 in part"
    assert found["num_groups"] == expected["num_groups"]
    assert found["flos"] == pytest.approx(expected["flos"], rel=0.1), "micro-batches are cut otherwise"


def test_processes_that_cannot_be_grouped_are_refused(tmp_path: Path) -> None:
    with pytest.raises(kvpref.InputError, match=r"sequence_parallel must divide .* got 2 with 1 process"):
        make_args(str(tmp_path), sequence_parallel=2)
    with pytest.raises(kvpref.InputError, match=r"sequence_parallel must divide .* got 0"):
        make_args(str(tmp_path), sequence_parallel=0)


@pytest.mark.parametrize("name", ["sp_size", "cp_size", "tp_size"])
def test_rows_are_split_once(name: str) -> None:
    args: Any = SimpleNamespace(world_size=4, parallelism_config=SimpleNamespace(**{name: 2}))
    with pytest.raises(kvpref.InputError, match=f"accelerate's {name}=2"):
        check_sequence_parallel(args, 2)
    check_sequence_parallel(args, 1)


def test_images_are_refused_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvpref.parallel.sequence.sequence_ranks", lambda model: object())
    with pytest.raises(kvpref.InputError, match="sequence_parallel does not go with images"):
        train_with_images(str(tmp_path), "full")
