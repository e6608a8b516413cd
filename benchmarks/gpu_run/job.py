"""A worker's job: some rows of a stage, one after another."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers  # noqa: F401 - slow to import, and every stage with a model needs it
from options import SweepOptions

import kvpref.engine.schedules  # noqa: F401 - as above
from gpu_run.rows import Finding, failed
from gpu_run.stages import STAGES
from kvpref.profiling.provenance import Provenance

CUDA_ERROR_EXIT_CODE = 3
"""After a CUDA error nothing else can run in the process."""
_DRIVER_VERSION = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


class Send(Protocol):
    """Reports an event to the driver."""

    def __call__(self, event: str, **values: Any) -> None: ...


def run_job(send: Send, *, stage: str, start: int, count: int | None, dry_run: bool, with_about: bool) -> None:
    """Run some rows of a stage.

    Args:
        send: Gets what happens.
        stage: Its name.
        start: Index of the first row.
        count: How many rows; None for all that are left.
        dry_run: Tiny shapes on the CPU.
        with_about: Tell about the machine first.
    """
    if not dry_run and not torch.cuda.is_available():
        send("refused", reason=f"torch {torch.__version__} sees no CUDA device")
        return
    options = SweepOptions(device=torch.device("cpu" if dry_run else "cuda"), gpu_rows=True, dry_run=dry_run)
    is_cuda = options.device.type == "cuda"
    if with_about:
        send("about", about=about(options.device))
    module = next(item.module for item in STAGES if item.name == stage)
    rows = list(importlib.import_module(module).rows(options).items())
    send("rows", names=[name for name, _ in rows])
    for name, run in rows[start:][:count]:
        send("start", name=name)
        finding = run_row(run)
        send("row", name=name, finding=finding.to_json())
        if is_cuda and finding.status == "failed" and _has_cuda_error():
            os._exit(CUDA_ERROR_EXIT_CODE)
        if is_cuda:
            gc.collect()
            torch.cuda.empty_cache()
    send("done")


def run_row(run: Callable[[], Finding]) -> Finding:
    """What a row found; one that raises has failed."""
    try:
        finding = run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # an error that comes late belongs to this row
    except Exception as error:  # a stage loses this row and no other
        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        return failed(f"{type(error).__name__}: {first_line[:300]}")
    return finding


def about(device: torch.device) -> dict[str, Any]:
    """Machine, versions, date and commit."""
    commit = _first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    cuda = {"cuda_version": torch.version.cuda, "driver": _first_line(*_DRIVER_VERSION)}
    return asdict(Provenance.collect(device)) | {"git_commit": commit} | (cuda if device.type == "cuda" else {})


def _first_line(*command: str) -> str | None:
    """First line that a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)


def _has_cuda_error() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
