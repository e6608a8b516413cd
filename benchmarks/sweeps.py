"""Sweeps of speed-ups with their FLOP-exact ideals; tables, JSON and PNG.

The cases of a row take turns in one process and ratios are taken inside each round, so that other load on the machine
falls on all of them. On a GPU each row has its own process, so that one that breaks does not affect others:

    OMP_NUM_THREADS=1 python benchmarks/sweeps.py             # all of them on the CPU
    python benchmarks/sweeps.py --sweep train_step --row hh_harmless
    python benchmarks/sweeps.py --device cuda                 # layers of an 8B model in bfloat16
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import attention
import forward_backward
import images
import layer_kinds
import logprob
import torch
import train_step
import trainer
import trajectories
from options import MissingDataError, SweepOptions
from places import results_folder
from row_process import measure_apart, measure_here

from kvpref.errors import RunError
from kvpref.profiling.compare.comparison import Comparison
from kvpref.profiling.compare.plot import draw
from kvpref.profiling.compare.report import Column, Report, comparison_table
from kvpref.profiling.provenance import Provenance
from kvpref.profiling.timing import CLOCKS

SWEEPS: dict[str, ModuleType] = {
    "attention": attention,
    "logprob": logprob,
    "forward_backward": forward_backward,
    "layer_kinds": layer_kinds,
    "images": images,
    "train_step": train_step,
    "trainer": trainer,
    "trajectories": trajectories,
}
MEASURE = {"cuda": measure_apart}
"""How a row is measured on a type of device; in this process for others."""


def main() -> int:
    args = parse_arguments()
    if args.device == "cuda" and not args.dry_run and not torch.cuda.is_available():
        print("error: --device cuda needs a CUDA device; --dry-run runs its rows tiny on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if args.device == "cuda" and not args.dry_run else "cpu")
    options = SweepOptions(
        device=device,
        gpu_rows=args.device == "cuda",
        quick=args.quick,
        dry_run=args.dry_run,
        shared=args.shared,
        clock=args.clock,
    )
    rows = {name: list(SWEEPS[name].rows(options)) for name in args.sweep}
    known = {row for names in rows.values() for row in names}
    unknown = sorted(set(args.row) - known)
    if unknown:
        print(f"error: no row {unknown[0]!r}; choose from: {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.budget if args.budget is not None else None
    failed = False
    for name in args.sweep:
        if args.row and not set(args.row) & set(rows[name]):
            continue
        report = run_sweep(name, options, args.row, deadline, args.output)
        failed |= any(reason.startswith("failed") for reason in report.skipped.values())
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="append", choices=list(SWEEPS), help="once per sweep; default: all")
    parser.add_argument("--row", action="append", default=[], help="once per row by its name; default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="which rows, and where they run")
    parser.add_argument("--quick", action="store_true", help="a few rows, two or three minutes")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes and made-up data on the CPU, seconds")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="process: CPU time, if others work here")
    parser.add_argument("--shared", type=Path, help="folder with data/ and tokenizers/")
    parser.add_argument("--budget", type=float, help="seconds after which no new row starts")
    parser.add_argument(
        "--output", type=Path, help="default: $OUT, or benchmarks/results; outputs/bench for a part of the rows"
    )
    args = parser.parse_args()
    args.output = args.output or results_folder(keep=not (args.quick or args.dry_run or args.row))
    args.sweep = args.sweep or list(SWEEPS)
    return args


def run_sweep(name: str, options: SweepOptions, only: list[str], deadline: float | None, output: Path) -> Report:
    """Measure the rows of one sweep; print its table, write its JSON after every row and its PNG at the end."""
    rows = [row for row in SWEEPS[name].rows(options) if not only or row in only]
    comparisons: list[Comparison] = []
    skipped: dict[str, str] = {}
    stem = f"{name}_cuda" if options.gpu_rows else name
    measure = MEASURE.get(options.device.type, measure_here)
    for row in rows:
        if deadline is not None and time.monotonic() > deadline:
            skipped[row] = "the time budget is spent"
            continue
        print(f"{name}: {row}", file=sys.stderr, flush=True)
        try:
            comparisons.append(measure(SWEEPS[name].__name__, row, options))
        except MissingDataError as error:
            skipped[row] = str(error)
        except (torch.OutOfMemoryError, RunError) as error:
            skipped[row] = f"failed: {error}"
        make_report(name, options, comparisons, skipped).write(output / f"{stem}.json")
    report = make_report(name, options, comparisons, skipped)
    report.write(output / f"{stem}.json")
    show(report, output / f"{stem}.png", getattr(SWEEPS[name], "COLUMNS", ()))
    return report


def make_report(name: str, options: SweepOptions, comparisons: list[Comparison], skipped: dict[str, str]) -> Report:
    """What has been measured so far."""
    return Report(
        title=SWEEPS[name].TITLE + (" (CPU time)" if options.clock == "process" else ""),
        provenance=Provenance.collect(options.device),
        settings={
            "dtype": str(options.dtype),
            "quick": options.quick,
            "dry_run": options.dry_run,
            "gpu_rows": options.gpu_rows,
            "clock": options.clock,
        },
        comparisons=tuple(comparisons),
        skipped=dict(skipped),
    )


def show(report: Report, picture: Path, extra: Sequence[Column]) -> None:
    """Print the table with a sweep's extra columns and the skipped rows; draw the picture."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 150)
    if report.comparisons:
        console.print(comparison_table(report, extra))
    for row, reason in report.skipped.items():
        console.print(f"skipped {row}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if not draw(report, picture):
        console.print(f"no {picture.name}: matplotlib is not installed, or there is nothing to draw", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
