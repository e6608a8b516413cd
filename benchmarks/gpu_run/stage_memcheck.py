"""compute-sanitizer's memcheck on the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from options import SweepOptions

from gpu_run import memcheck_target
from gpu_run.rows import Figure, Finding, Rows, failed, judged, skipped
from gpu_run.working_backends import fast_backends

TOOL = "compute-sanitizer"
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")


def rows(options: SweepOptions) -> Rows:
    """One row for PyTorch's own kernels, and one per package."""
    backends = fast_backends(options)
    shipped = [name for name in backends if name in ("cpu_flash", "cuda_flash", "efficient")]
    groups = [shipped, *([name] for name in backends if name not in shipped)]
    return {" and ".join(group): partial(_row, group, options) for group in groups}


def _row(backends: list[str], options: SweepOptions) -> Finding:
    if options.device.type != "cuda":
        memcheck_target.run(backends, options.device, options.dtype)
        return skipped("ran without the tool, which checks the memory of CUDA devices")
    tool = find_tool()
    if tool is None:
        return skipped(f"{TOOL} is neither on the PATH nor in /usr/local/cuda/bin")
    # The caching allocator would hide a write beyond one tensor into its neighbour.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Importing torch takes longer than the tool waits for a process that uses CUDA, unless told to wait for ever.
    settings = ["--tool", "memcheck", "--launch-timeout", "0", "--target-processes", "application-only"]
    command = [tool, *settings, "--print-limit", "5", sys.executable, memcheck_target.__file__, *backends]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(done.stdout, done.stderr, file=sys.stderr)
    return read_report(done)


def find_tool() -> str | None:
    """Where compute-sanitizer is."""
    beside_cuda = Path("/usr/local/cuda/bin") / TOOL
    return shutil.which(TOOL) or (str(beside_cuda) if beside_cuda.exists() else None)


def read_report(done: subprocess.CompletedProcess[str]) -> Finding:
    """The tool's report as a finding."""
    found = _SUMMARY.findall(done.stdout + done.stderr)
    if not found or "ran to its end" not in done.stdout:
        return _not_ended(done)
    count = sum(map(int, found))
    first = next((line for line in done.stdout.splitlines() if "Invalid" in line or "error" in line.lower()), "")
    return judged(
        met=count == 0,
        bar="no error",
        figures={"errors": Figure(count, "")},
        reason=first.strip(" =")[:200] if count else None,
    )


def _not_ended(done: subprocess.CompletedProcess[str]) -> Finding:
    last = next(iter(reversed((done.stdout + done.stderr).strip().splitlines())), "")
    return failed(f"exit code {done.returncode}: {last[:200]}")
