"""Under DistributedDataParallel each rank's losses are TRL's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import trl_runs
from two_processes import run_two_processes

WORKER = Path(__file__).with_name("trl_distributed_worker.py")


@pytest.mark.full
@pytest.mark.slow
def test_two_processes_give_trls_losses(tmp_path: Path) -> None:
    path = trl_runs.save_model(tmp_path / "model")
    run_two_processes(WORKER, path, tmp_path)
    ranks = [json.loads((tmp_path / f"losses-{rank}.json").read_text()) for rank in range(2)]
    for losses in ranks:
        assert len(losses["trl"]) == trl_runs.NUM_STEPS
        assert losses["kvpref"] == pytest.approx(losses["trl"], rel=1e-5, abs=1e-5)
    # Gradients are averaged over ranks, whose batches differ.
    assert ranks[0]["trl"][1:] != pytest.approx(ranks[1]["trl"][1:], abs=1e-3)
