"""The benchmark of planning with tiny batches: it measures every batch and plan, and its stages are all of the time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_a_dry_run_measures_every_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import planning

    monkeypatch.setattr(sys, "argv", ["planning.py", "--dry-run", "--output", str(tmp_path)])
    assert planning.main() == 0
    found = json.loads((tmp_path / "planning.json").read_text())
    batches = ("responses", "trajectories", "trajectories per call")
    assert [(row["batch"], row["mode"]) for row in found["rows"]] == [(b, m) for b in batches for m in planning.PLANS]
    for row in found["rows"]:
        us = row["us_per_unique_token"]
        # Every stage was entered, so the functions that it names are those that are called.
        assert min(us["tree"], us["layout"], us["tensors"]) > 0
        assert us["tree"] + us["layout"] + us["tensors"] == pytest.approx(us["total"])
    # 2 groups of 40 tokens and 3 responses of 4.
    assert {row["unique_tokens"] for row in found["rows"][:4]} == {2 * (40 + 3 * 4)}


def test_calls_are_the_histories_of_whole_trajectories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from trajectory_data import made_up_trajectories

    whole, calls = made_up_trajectories("whole", num_tasks=1), made_up_trajectories("per call", num_tasks=1)
    attempts = {sequence.input_ids: sequence for sequence in whole[0].sequences}
    assert len(attempts) == 4
    for call in calls[0].sequences:
        (turn,) = call.turns
        assert turn[1] == len(call)
        assert any(ids[: len(call)] == call.input_ids and turn in s.turns for ids, s in attempts.items())
    assert len(calls[0]) == sum(len(sequence.turns) for sequence in attempts.values())
