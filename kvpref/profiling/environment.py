"""What this machine offers and what is wrong: devices, versions, threads, attention backends."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvpref.profiling.automatic import DeviceChoice, automatic_choices
from kvpref.profiling.backend_probe import BackendProbe, probe_backends
from kvpref.profiling.flash_activation import activation_warnings
from kvpref.profiling.provenance import Provenance

PACKAGES = (
    "kvpref",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
)
SUPPORTED_VERSIONS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "torch": ((2, 11), (2, 13)),
    "transformers": ((5, 17), (5, 23)),
}
"""Oldest and newest minor version covered by the tests, inclusive."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One processor that kvpref can run on."""

    kind: str
    """``cpu`` or ``cuda``."""

    name: str
    """The maker's name for it."""

    memory_bytes: int | None
    """Its total memory; None if the system does not say."""

    compute_capability: str | None
    """Compute capability of a CUDA device, such as 9.0; None for a CPU."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The findings of `kvpref doctor`."""

    python: str

    packages: dict[str, str | None]
    """Installed version per package of `PACKAGES`; None if it is missing."""

    devices: tuple[Device, ...]
    """The CUDA devices, then the CPU."""

    num_cpus: int
    """Processors that this process may use."""

    num_threads: int
    """Threads of a PyTorch operation on the CPU."""

    backends: tuple[BackendProbe, ...]
    """The result of trying every attention backend."""

    automatic: tuple[DeviceChoice, ...]
    """The backend that `auto` takes on each device."""

    warnings: tuple[str, ...]
    """Common problems, each with what to do."""

    @property
    def has_fast_backend(self) -> bool:
        """Whether an attention backend other than the slow reference works."""
        return any(backend.is_fast for backend in self.backends)

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values, with `works` per backend."""
        backends = [asdict(backend) | {"works": backend.works} for backend in self.backends]
        return asdict(self) | {"backends": backends, "has_fast_backend": self.has_fast_backend}


def inspect_environment() -> Environment:
    """Inspect this process and machine, and try the attention backends."""
    provenance = Provenance.collect(torch.device("cpu"))
    packages = {name: _installed(name) for name in PACKAGES}
    warnings = [
        *version_warnings(packages),
        *gpu_warnings(has_gpu=_nvidia_gpu_present()),
        *thread_warnings(os.environ, provenance.num_cpus),
        *activation_warnings(),
    ]
    return Environment(
        python=provenance.python_version,
        packages=packages,
        devices=(*_cuda_devices(), _cpu(provenance.cpu)),
        num_cpus=provenance.num_cpus,
        num_threads=provenance.num_threads,
        backends=tuple(probe_backends()),
        automatic=tuple(automatic_choices()),
        warnings=tuple(warnings),
    )


def version_warnings(packages: Mapping[str, str | None]) -> list[str]:
    """One warning for each package outside `SUPPORTED_VERSIONS` or missing."""
    warnings = []
    for name, (oldest, newest) in SUPPORTED_VERSIONS.items():
        found = packages[name]
        if found is not None and oldest <= _minor(found) <= newest:
            continue
        after = (newest[0], newest[1] + 1)
        warnings.append(
            f"{name} {found or 'is not installed'}: kvpref is tested with {_dotted(oldest)} to {_dotted(newest)}; "
            f'pip install "{name}>={_dotted(oldest)},<{_dotted(after)}"'
        )
    return warnings


def gpu_warnings(*, has_gpu: bool) -> list[str]:
    """A warning if the machine has an NVIDIA GPU that this PyTorch cannot use."""
    if not has_gpu or torch.cuda.is_available():
        return []
    if torch.version.cuda is None:
        return [
            f"the machine has an NVIDIA GPU, but torch {torch.__version__} is built without CUDA; "
            "install a CUDA build (pytorch.org/get-started)"
        ]
    return [
        f"the machine has an NVIDIA GPU, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it; "
        "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
    ]


def thread_warnings(variables: Mapping[str, str], num_cpus: int) -> list[str]:
    """A warning if OMP_NUM_THREADS asks for more threads than there are processors."""
    first = variables.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # nested levels are separated by commas
    if not first.isdigit() or int(first) <= num_cpus:
        return []
    return [
        f"OMP_NUM_THREADS={first} is more than the {num_cpus} processors of this process: threads wait for one "
        f"another; set it to at most {num_cpus}"
    ]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _minor(text: str) -> tuple[int, int]:
    """``2.13.0+cpu`` -> (2, 13)."""
    numbers = [int(number) for number in re.findall(r"\d+", text)[:2]]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0)


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


def _nvidia_gpu_present() -> bool:
    """Whether the driver shows a device, independently of PyTorch (Linux)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/proc/driver/nvidia/gpus").glob("*"))


def _cuda_devices() -> list[Device]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        Device(
            kind="cuda",
            name=properties.name,
            memory_bytes=properties.total_memory,
            compute_capability=f"{properties.major}.{properties.minor}",
        )
        for properties in found
    ]


def _cpu(name: str) -> Device:
    pages = getattr(os, "sysconf_names", {})  # absent on Windows
    known = "SC_PHYS_PAGES" in pages and "SC_PAGE_SIZE" in pages
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    return Device(kind="cpu", name=name, memory_bytes=memory_bytes, compute_capability=None)
