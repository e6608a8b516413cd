"""Starts a worker script in two gloo processes, and ends them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from torch import distributed


def run_two_processes(worker: Path, *arguments: object) -> None:
    """Run `worker` under torchrun with two ranks on the CPU, and fail with its errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(worker.parents[1]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    done = subprocess.run(
        [*command, str(worker), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def leave_together() -> NoReturn:
    """End a worker, without Python's own shutdown.

    gloo's thread may still hold the last collective's tensors, and the process aborts where that thread releases one
    while the interpreter goes down.
    """
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
