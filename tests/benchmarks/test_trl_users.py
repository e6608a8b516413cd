"""The benchmark for users of TRL: every way trains, their numbers agree, and other numbers are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra kvpref[trl]")

from kvpref.errors import RunError
from kvpref.profiling.timing import TimingOptions

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # benchmarks are scripts, not part of the package

import trl_users_table  # noqa: E402
from trl_users import WORKLOADS  # noqa: E402
from trl_users.dpo import PairPreferences  # noqa: E402
from trl_users.measure import measure  # noqa: E402
from trl_users.ways import WAYS  # noqa: E402

SHARING = [name for name in WAYS if name != "trl"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a dry run wrote to."""
    folder = tmp_path_factory.mktemp("results")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "OUT": str(folder)}
    command = [sys.executable, str(ROOT / "benchmarks" / "trl_users.py"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == trl_users_table.table(folder)
    return folder


def workloads(results: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((results / "trl_users.json").read_text())["workloads"]
    assert [item["name"] for item in found] == list(WORKLOADS)
    return {item["name"]: item["ways"] for item in found}


@pytest.mark.full
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_dry_run_trains_every_way_alike(name: str, results: Path) -> None:
    ways = workloads(results)[name]
    assert list(ways) == list(WAYS)
    truth = ways["trl"]
    # Equal norms of other data would say little.
    assert len({round(norm, 2) for norm in truth["gradient_norms"]}) == 3
    for way in ways.values():
        assert len(way["rounds_ms"]) == 2
        # float32, summed in another order, over three updates
        assert way["losses"] == pytest.approx(truth["losses"], rel=1e-4)
        assert way["gradient_norms"] == pytest.approx(truth["gradient_norms"], rel=1e-4)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_ways_that_share_run_the_same_fewer_tokens(name: str, results: Path) -> None:
    ways = workloads(results)[name]
    tokens = {way: facts["layer_tokens"] for way, facts in ways.items()}
    assert all(tokens[way] == tokens["kvpref"] for way in SHARING)
    assert all(shared < 0.7 * padded for shared, padded in zip(tokens["kvpref"], tokens["trl"], strict=True))
    assert "3 of 3 calls served" in ways["shared_prefix"]["switch"]


def test_the_table_has_a_cell_per_way_and_workload(results: Path) -> None:
    head, _, *rows = trl_users_table.table(results)
    assert head.count("|") == 2 + len(WORKLOADS)
    assert len(rows) == len(WAYS)
    assert all(row.count("tokens") == len(WORKLOADS) for row in rows)
    assert all(cell.split(", ")[1] == "1.00x" for cell in rows[0].split(" | ")[1:])


class AnotherLoss(PairPreferences):
    loss = "hinge"


def test_a_way_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    workload = AnotherLoss()
    task = workload.take_steps(workload.made_up(tmp_path), 2)
    with pytest.raises(RunError, match=r"dpo, kvpref: \w+ differs from TRL's"):
        measure(workload, task, TimingOptions(num_rounds=1, num_warmup=1))
