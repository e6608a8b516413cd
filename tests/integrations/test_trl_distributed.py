"""Under DistributedDataParallel each rank's losses are TRL's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

import trl_runs

WORKER = Path(__file__).with_name("trl_distributed_worker.py")


@pytest.mark.slow
def test_two_processes_give_trls_losses(tmp_path: Path) -> None:
    path = trl_runs.save_model(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(WORKER.parents[1]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    done = subprocess.run(
        [*command, str(WORKER), path, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"losses-{rank}.json").read_text()) for rank in range(2)]
    for losses in ranks:
        assert len(losses["trl"]) == trl_runs.NUM_STEPS
        assert losses["kvpref"] == pytest.approx(losses["trl"], rel=1e-5, abs=1e-5)
    # Gradients are averaged over ranks, whose batches differ.
    assert ranks[0]["trl"][1:] != pytest.approx(ranks[1]["trl"][1:], abs=1e-3)
