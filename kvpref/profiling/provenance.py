"""Where a measurement comes from: versions, machine, threads, date. Every results file begins with it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import kvpref


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a reader needs to judge or repeat a measurement."""

    date: str
    """UTC, ISO 8601, to the second."""

    kvpref_version: str

    torch_version: str
    """Version of PyTorch, with its build."""

    transformers_version: str

    python_version: str

    cpu: str
    """Model of the processor."""

    num_cpus: int
    """Processors that this process may use."""

    num_threads: int
    """Threads of a PyTorch operation on the CPU."""

    gpu: str | None
    """Name of the CUDA device; None without one."""

    @classmethod
    def collect(cls, device: torch.device) -> Provenance:
        """The provenance of work on `device` in this process."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            kvpref_version=kvpref.__version__,
            torch_version=torch.__version__,
            transformers_version=_version("transformers"),
            python_version=platform.python_version(),
            cpu=_cpu_model(),
            num_cpus=_num_cpus(),
            num_threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        )

    def line(self) -> str:
        """A line for the heading of a table."""
        threads = f"{self.num_threads} thread{'s' if self.num_threads != 1 else ''}"
        machine = self.gpu or f"{self.cpu}, {threads}"
        return f"{machine}; torch {self.torch_version}, transformers {self.transformers_version}, {self.date}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _num_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _cpu_model() -> str:
    """The name in /proc/cpuinfo, if any; on Linux `platform.processor()` is empty or only the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
