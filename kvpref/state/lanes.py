"""Lanes: work that runs in order on a device, in parallel to other lanes; CUDA streams, or a stand-in without CUDA."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch


class Lane(Protocol):
    """Operators that run one after another, in the order in which the host submits them, without the host waiting."""

    def record(self) -> Any:
        """An event that completes when everything submitted so far has."""

    def wait(self, event: Any) -> None:
        """Make everything submitted from now on wait for the event."""

    def running(self) -> AbstractContextManager[Any]:
        """Submit the operators called inside to this lane."""


class Lanes(NamedTuple):
    """The lanes that move keys and values between a device and the host.

    Attributes:
        compute: The lane of the model.
        up: Copies to the device.
        down: Copies to the host.
    """

    compute: Lane
    up: Lane
    down: Lane


@cache
def lanes_of(device: torch.device) -> Lanes:
    """The lanes of a device, the same for all chunks and steps."""
    if device.type != "cuda":
        return Lanes(_Inline(), _Inline(), _Inline())
    up, down = torch.cuda.Stream(device), torch.cuda.Stream(device)
    return Lanes(_CudaLane(device, None), _CudaLane(device, up), _CudaLane(device, down))


class _Inline:
    """The lane of a device that runs everything in call order."""

    def record(self) -> None:
        return None

    def wait(self, event: None) -> None:
        pass

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()


class _CudaLane:
    """A separate stream, or None for the current one: autograd's threads use the forward pass's stream."""

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
