"""Starts a worker script in two or more gloo processes, and ends them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from torch import distributed

TIMEOUT_SECONDS = 1200
"""Against hanging only."""


def run_two_processes(worker: Path, *arguments: object, num_ranks: int = 2) -> None:
    """Run `worker` on two ranks or more, and fail with its errors."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # where the package is, if it is not installed
    path = os.pathsep.join([*map(str, worker.parents[1:3]), *filter(None, given)])
    _run([Path(__file__).with_name("forked_workers.py"), num_ranks, worker, *arguments], PYTHONPATH=path)


def torchrun(*arguments: object, num_ranks: int = 2, **environment: str) -> None:
    """`torchrun --nproc-per-node NUM_RANKS ARGUMENTS...`, which must succeed."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", num_ranks, "--standalone"]
    _run([*launcher, *arguments], **environment)


def _run(arguments: list[object], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
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
