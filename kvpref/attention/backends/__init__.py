"""The registry of attention backends: one file each, none imports another."""

from __future__ import annotations

import torch

from kvpref.attention.backends.cpu_flash import CpuFlash
from kvpref.attention.backends.cuda_flash import CudaFlash
from kvpref.attention.backends.interface import Backend
from kvpref.attention.backends.reference import Reference

_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CpuFlash(), CudaFlash(), Reference())}


def available_backends(query: torch.Tensor) -> list[str]:
    """Names of the backends that can run attention for a query like this (device, dtype, head dim)."""
    return [name for name, backend in _BACKENDS.items() if backend.unsupported_reason(query) is None]


def get_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        ValueError: If there is none; the message lists the names.
    """
    if name not in _BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose from: auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


def select_backend(name: str, query: torch.Tensor) -> Backend:
    """Resolve a backend name, where ``auto`` takes the first that serves the query's device and dtype.

    Raises:
        ValueError: If a backend that was named cannot serve; the message gives the reason and the ones that can.
    """
    if name == "auto":
        return _BACKENDS[available_backends(query)[0]]
    backend = get_backend(name)
    reason = backend.unsupported_reason(query)
    if reason is not None:
        raise ValueError(
            f"attention backend {name!r} cannot run here: {reason}; these can: {', '.join(available_backends(query))}"
        )
    return backend
