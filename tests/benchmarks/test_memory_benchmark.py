"""The memory benchmark with tiny, made-up data: every part runs and says what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
def test_a_dry_run_measures_every_part(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "OUT": str(tmp_path)}
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "memory.json").read_text())
    # float32: two schedules sum in another order.
    assert found["responses"]["largest_loss_difference"] < 1e-5
    bounded, full = found["long_prompt"]["rows"]
    assert bounded["losses"] == pytest.approx(full["losses"], abs=1e-5)
    assert 0 < bounded["peak_bytes"] < full["peak_bytes"]
    rows = {row["name"]: row for row in found["sharing"]["rows"]}
    assert rows["bounded, once per step"]["tokens"] <= rows["full"]["tokens"]
    assert all(row["loss"] == pytest.approx(rows["full"]["loss"], abs=1e-5) for row in rows.values())
