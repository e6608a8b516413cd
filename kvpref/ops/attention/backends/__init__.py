"""The registry of attention backends: one file each, none imports another."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from kvpref.errors import InputError
from kvpref.ops.attention.backends import determinism, torch_flash
from kvpref.ops.attention.backends.cpu_flash import CpuFlash
from kvpref.ops.attention.backends.cuda_flash import CudaFlash
from kvpref.ops.attention.backends.efficient import Efficient
from kvpref.ops.attention.backends.flash_attn import FlashAttn, FlashAttn3, FlashAttn4
from kvpref.ops.attention.backends.interface import PLAIN, Backend, Needs
from kvpref.ops.attention.backends.packaged import PackagedBackend
from kvpref.ops.attention.backends.reference import Reference
from kvpref.ops.attention.backends.tiled import Tiled
from kvpref.ops.attention.backends.xformers import Xformers

_BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        *(CpuFlash(), CudaFlash(), Efficient(), Tiled(), Reference()),
        # Their packages are imported when a user names one or `auto` prefers it.
        *(FlashAttn(), FlashAttn3(), FlashAttn4(), Xformers()),
    )
}
_AUTOMATIC = {"cpu": (CpuFlash.name,), "cuda": (CudaFlash.name, Efficient.name)}
"""What `auto` tries before `tiled`, by type of device."""
_HOPPER = 9
"""Major compute capability."""

_logger = logging.getLogger("kvpref.attention")


@dataclass(frozen=True, kw_only=True)
class AutomaticChoice:
    """What `auto` takes for a query."""

    backend: Backend
    """The first backend that can serve."""

    refusals: dict[str, str]
    """The backends that `auto` prefers on this device, best first, each with the reason it cannot serve."""

    def __str__(self) -> str:
        said = f"{self.backend.name} ({self.backend.provider()})"
        for name, reason in self.refusals.items():
            return f"{said}, not {name}: {reason}"
        is_packaged = isinstance(self.backend, PackagedBackend)
        return f'{said}; backend="cuda_flash" keeps PyTorch\'s FlashAttention-2' if is_packaged else said


def backend_names() -> tuple[str, ...]:
    """The names of all backends, those that need no package first."""
    return tuple(_BACKENDS)


def available_backends(query: torch.Tensor, needs: Needs = PLAIN) -> list[str]:
    """Names of the backends that can serve a query like this (device, dtype, head dim) and its needs.

    Imports the optional packages that are installed, and runs a tiny call of each.
    """
    return [name for name, backend in _BACKENDS.items() if backend.unsupported_reason(query, needs) is None]


def get_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        InputError: If there is no such backend; the message lists the names.
    """
    if name not in _BACKENDS:
        raise InputError(f"unknown attention backend {name!r}; choose from: auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


def choose_automatically(query: torch.Tensor, needs: Needs = PLAIN) -> AutomaticChoice:
    """What `auto` takes for a query like this (device, dtype, head dim) and its needs, and why not something better.

    Raises:
        InputError: If no backend can serve.
    """
    refusals: dict[str, str] = {}
    for name in _candidates(query.device, needs):
        reason = _BACKENDS[name].unsupported_reason(query, needs)
        if reason is None:
            return AutomaticChoice(backend=_BACKENDS[name], refusals=refusals)
        refusals[name] = reason
    raise InputError(f"no attention backend can run {query.dtype} on {query.device}; use a float dtype")


def select_backend(name: str, query: torch.Tensor, needs: Needs = PLAIN) -> Backend:
    """Resolve a backend name; ``auto`` takes the best that serves the query's device, dtype, head dim and needs.

    Raises:
        InputError: If the named backend cannot serve; the message gives the reason and the ones that can.
            For ``auto``, if none can.
    """
    if query.device.type != "cuda":
        return _select(name, query, needs)
    # Every layer of every pass asks, and on CUDA finding the answer takes longer than starting a kernel.
    rules = (determinism.is_required(), torch_flash.activated())
    kind = (name, query.device, query.dtype, query.shape[-1], needs, *rules)
    found = _selected.get(kind)
    if found is None:
        found = _selected[kind] = _select(name, query, needs)
    return found


_selected: dict[tuple[object, ...], Backend] = {}
"""Earlier selections on CUDA, keyed by everything that the selection depends on."""


def _select(name: str, query: torch.Tensor, needs: Needs) -> Backend:
    if name == "auto":
        choice = choose_automatically(query, needs)
        if _logger.isEnabledFor(logging.INFO):
            _announce(str(choice), query.device, query.dtype)
        return choice.backend
    backend = get_backend(name)
    reason = backend.unsupported_reason(query, needs)
    if reason is not None:
        others = ", ".join(available_backends(query, needs))
        raise InputError(f"attention backend {name!r} cannot run here: {reason}; these can: {others}")
    return backend


def _candidates(device: torch.device, needs: Needs) -> Iterator[str]:
    """What `auto` tries on a device, in order.

    Kernels that a user has activated in PyTorch's own operator come first, through kvpref's backend for them. On Hopper
    FlashAttention-3, which was written for it, comes next. FlashAttention-4 is never taken unasked: it is in beta and
    compiles its kernels for each kind of call during the run. PyTorch's own kernels have no softcap, so flash-attn is
    tried before `tiled` where a softcap is needed.
    """
    preferred = []
    if device.type == "cuda":
        preferred = [name for name in (torch_flash.backend_of_activated(),) if name is not None]
        if torch.cuda.get_device_capability(device)[0] == _HOPPER:
            preferred.append(FlashAttn3.name)
    own = _AUTOMATIC.get(device.type, ())
    capped = [FlashAttn.name] if device.type == "cuda" and needs.softcap else []
    yield from dict.fromkeys([*preferred, *own, *capped, Tiled.name])


@cache  # once per process and kind of query
def _announce(choice: str, device: torch.device, dtype: torch.dtype) -> None:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    _logger.info("attention on %s in %s: auto takes %s", where, str(dtype).removeprefix("torch."), choice)
