"""Lanes: what runs in order on a device, beside other lanes; streams of CUDA, and a stand-in where there are none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch


class Lane(Protocol):
    """Operators that run one after another, in the order in which the host hands them in. The host waits for none."""

    def record(self) -> Any:
        """An event: over as soon as all that was handed in so far is."""

    def wait(self, event: Any) -> None:
        """What is handed in from now on begins when the event is over."""

    def running(self) -> AbstractContextManager[Any]:
        """Operators called inside are handed in here."""


class Lanes(NamedTuple):
    """Those that move keys and values between a device and the host.

    Attributes:
        compute: Where the model runs.
        up: Copies to the device.
        down: Copies to the host.
    """

    compute: Lane
    up: Lane
    down: Lane


@cache
def lanes_of(device: torch.device) -> Lanes:
    """The lanes of a device, the same ones for all chunks and steps."""
    if device.type != "cuda":
        return Lanes(_Inline(), _Inline(), _Inline())
    up, down = torch.cuda.Stream(device), torch.cuda.Stream(device)
    return Lanes(_CudaLane(device, None), _CudaLane(device, up), _CudaLane(device, down))


class _Inline:
    """The lane of a device that runs everything in the order in which it is called."""

    def record(self) -> None:
        return None

    def wait(self, event: None) -> None:
        pass

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()


class _CudaLane:
    """A stream of its own, or None for the current one: autograd's threads have that of the forward pass."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device, self._own = device, stream

    def record(self) -> torch.cuda.Event:
        return self._stream().record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        self._stream().wait_event(event)

    def running(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream())

    def _stream(self) -> torch.cuda.Stream:
        return self._own or torch.cuda.current_stream(self._device)
