"""Everything that needs a GPU, in one command that ends in time: correctness first, then speed.

    python benchmarks/gpu.py              # on a machine with one CUDA device, under eight minutes
    python benchmarks/gpu.py --dry-run    # the same stages with tiny shapes on the CPU

Each stage is a separate process with a share of the time; a row that breaks or hangs costs no other row. Results
are written after every row: gpu.json in $OUT if that is set, else in benchmarks/results/gpu. Nothing needs to be
installed beside torch and transformers.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import gpu_page
from gpu_run.driver import Driver, RefusedError
from gpu_run.results import FILE_NAME, Results, table
from gpu_run.stages import STAGES, TOTAL_S
from places import results_folder


def main() -> int:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, _end)
    args.output.mkdir(parents=True, exist_ok=True)
    results = Results(args.output / FILE_NAME, dry_run=args.dry_run)
    stages = tuple(stage for stage in STAGES if not args.stage or stage.name in args.stage)
    log = args.output / "gpu_log.txt"
    log.unlink(missing_ok=True)
    started = time.monotonic()
    driver = Driver(results, log, dry_run=args.dry_run, budget_s=args.budget, stages=stages)
    try:
        driver.run()
    except RefusedError as error:
        print(f"error: {error}; --dry-run runs the stages tiny on the CPU", file=sys.stderr)
        return 2
    print("\n".join(table(results)))
    print(f"{time.monotonic() - started:.0f} s; results in {results.path}")
    if results.path == gpu_page.RESULTS and not args.dry_run:
        gpu_page.write()
    return 1 if results.has_failures else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--stage", action="append", choices=[stage.name for stage in STAGES], help="default: all")
    parser.add_argument("--budget", type=float, default=TOTAL_S, help="seconds for everything")
    parser.add_argument("--output", type=Path, help="default: $OUT, or benchmarks/results/gpu; outputs/bench if dry")
    args = parser.parse_args()
    # A part of the stages, or a dry run, must not replace kept results.
    keep = not args.dry_run and not args.stage
    args.output = args.output or results_folder(keep=keep, part="gpu")
    return args


def _end(number: int, frame: FrameType | None) -> None:
    # Via an exception, so that the workers end too.
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
