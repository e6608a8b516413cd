"""The registry of attention backends: one file each, none imports another."""

from __future__ import annotations

import torch

from kvpref.attention.backends.cpu_flash import CpuFlash
from kvpref.attention.backends.cuda_flash import CudaFlash
from kvpref.attention.backends.efficient import Efficient
from kvpref.attention.backends.flash_attn import FlashAttn, FlashAttn3, FlashAttn4
from kvpref.attention.backends.interface import Backend
from kvpref.attention.backends.reference import Reference
from kvpref.attention.backends.xformers import Xformers
from kvpref.errors import InputError

# What `auto` tries, in this order.
_AUTOMATIC: tuple[Backend, ...] = (CpuFlash(), CudaFlash(), Efficient(), Reference())
# Chosen only by name: their packages are imported when somebody asks for them.
_BY_NAME: tuple[Backend, ...] = (FlashAttn(), FlashAttn3(), FlashAttn4(), Xformers())
_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (*_AUTOMATIC, *_BY_NAME)}


def backend_names() -> tuple[str, ...]:
    """All names, those that `auto` considers first."""
    return tuple(_BACKENDS)


def available_backends(query: torch.Tensor) -> list[str]:
    """Names of the backends that can run attention for a query like this (device, dtype, head dim).

    Imports the optional packages that are installed.
    """
    return [name for name, backend in _BACKENDS.items() if backend.unsupported_reason(query) is None]


def get_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        InputError: If there is none; the message lists the names.
    """
    if name not in _BACKENDS:
        raise InputError(f"unknown attention backend {name!r}; choose from: auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


def select_backend(name: str, query: torch.Tensor) -> Backend:
    """Resolve a backend name, where ``auto`` takes the first that serves the query's device and dtype.

    Raises:
        InputError: If a backend that was named cannot serve; the message gives the reason and the ones that can.
            For ``auto``, if none can.
    """
    if name == "auto":
        for candidate in _AUTOMATIC:
            if candidate.unsupported_reason(query) is None:
                return candidate
        raise InputError(f"no attention backend can run {query.dtype} on {query.device}; use a float dtype")
    backend = get_backend(name)
    reason = backend.unsupported_reason(query)
    if reason is not None:
        raise InputError(
            f"attention backend {name!r} cannot run here: {reason}; these can: {', '.join(available_backends(query))}"
        )
    return backend
