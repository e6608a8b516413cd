"""SIGKILL at random moments: a resumed run ends where an uninterrupted one does, to the bit.

The runs are forks of a process that has imported everything, so that a start costs milliseconds.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import environment
from safetensors.torch import load_file

FORKS = Path(__file__).parents[1] / "killed_runs.py"


@pytest.mark.parametrize(
    ("num_kills", "num_steps"),
    [pytest.param(3, 16, id="3"), pytest.param(20, 90, id="20", marks=pytest.mark.full)],
)
def test_killed_runs_end_as_uninterrupted_ones(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, num_kills: int, num_steps: int
) -> None:
    arguments = ["train", trained_dir, pairs_file, "--batch-size", 4, "--max-steps", num_steps, "--save-steps", 1]
    arguments += ["--logging-steps", 1, "--learning-rate", 1e-2, "--set", "use_cpu=true"]
    generator = random.Random(num_kills)
    job = {
        "arguments": [str(argument) for argument in arguments],
        "whole": str(tmp_path / "whole"),
        "parts": str(tmp_path / "parts"),
        "fractions": [generator.random() for _ in range(num_kills)],
        "num_steps": num_steps,
    }
    done = subprocess.run(
        [sys.executable, FORKS, json.dumps(job)], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, parts = Path(job["whole"]), Path(job["parts"])
    final, expected = load_file(parts / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(final[name], expected[name]) for name in expected)
    assert losses(parts) == losses(whole)
    assert "Traceback" not in done.stderr
    assert not list(parts.rglob("*partial*"))


def losses(output: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]
