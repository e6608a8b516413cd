"""Everything that wants a GPU, in one command that ends in time: the GPU tests, then the sweeps.

    python benchmarks/gpu.py              # on a machine with one CUDA device, under eight minutes
    python benchmarks/gpu.py --dry-run    # the same parts with tiny shapes on the CPU

Each part is a process of its own with a share of the time. A sweep starts no new row once its share is spent, and a
part that does not end is stopped; the others still run. Results go to $OUT if that is set, else to benchmarks/results/.
Nothing needs to be installed beside torch, transformers, rich and pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from places import HERE, ROOT, results_folder

GRACE_S = 35.0
"""What a part may take beyond its share: imports at its start, the row that is running at its end."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process."""

    name: str
    """What the summary calls it."""

    command: tuple[str, ...]
    """Arguments of the Python interpreter."""

    budget_s: float
    """Its share of the time; it is stopped `GRACE_S` later."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part ended."""

    name: str
    """As in `Part`."""

    exit_code: int | None
    """None if it was stopped or never started."""

    wall_s: float
    """How long it took."""

    note: str
    """Why it has no exit code."""


TEST_PATHS = ("tests/gpu", "tests/profiling/test_timing.py")
# Shares with their grace add up to less than eight minutes.
TESTS_BUDGET_S = 115.0
SWEEP_BUDGETS_S = {"attention": 70.0, "forward_backward": 60.0, "train_step": 30.0, "logprob": 15.0}
TOTAL_S = 465.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--budget", type=float, default=TOTAL_S, help="seconds for all parts together")
    parser.add_argument("--output", type=Path, help="default: $OUT, or benchmarks/results; outputs/bench if dry")
    args = parser.parse_args()
    args.output = args.output or results_folder(keep=not args.dry_run)
    args.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget
    outcomes = []
    for part in make_parts(args.output, dry_run=args.dry_run):
        outcomes.append(run_part(part, deadline))
        # After every part, so that an outer time limit loses nothing.
        summary = {"dry_run": args.dry_run, "parts": [asdict(outcome) for outcome in outcomes]}
        (args.output / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")
    for outcome in outcomes:
        code = outcome.note or f"exit code {outcome.exit_code}"
        print(f"{outcome.name}: {code}, {outcome.wall_s:.0f} s")
    print(f"results in {args.output}")
    return 0 if all(outcome.exit_code == 0 for outcome in outcomes) else 1


def make_parts(output: Path, *, dry_run: bool) -> list[Part]:
    """The tests, then one part per sweep, the most important first."""
    report = f"--junitxml={output / 'gpu_tests.xml'}"
    tests = ("-m", "pytest", "-m", "gpu", *TEST_PATHS, "-p", "no:cacheprovider", report)
    parts = [Part(name="tests", command=tests, budget_s=TESTS_BUDGET_S)]
    for sweep, budget_s in SWEEP_BUDGETS_S.items():
        command = (str(HERE / "sweeps.py"), "--sweep", sweep, "--device", "cuda", "--output", str(output))
        command += ("--budget", str(budget_s), *(("--dry-run",) if dry_run else ()))
        parts.append(Part(name=sweep, command=command, budget_s=budget_s))
    return parts


def run_part(part: Part, deadline: float) -> Outcome:
    """Run one part and wait for it, at most until its share or the whole time is spent."""
    started = time.monotonic()
    limit_s = min(part.budget_s + GRACE_S, deadline - started)
    if limit_s <= 0:
        return Outcome(name=part.name, exit_code=None, wall_s=0.0, note="skipped: the time is spent")
    print(f"--- {part.name}", flush=True)
    # The machine may have no installed kvpref, only this checkout.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run([sys.executable, *part.command], cwd=ROOT, env=environment, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(name=part.name, exit_code=None, wall_s=time.monotonic() - started, note="stopped: too slow")
    return Outcome(name=part.name, exit_code=done.returncode, wall_s=time.monotonic() - started, note="")


if __name__ == "__main__":
    sys.exit(main())
