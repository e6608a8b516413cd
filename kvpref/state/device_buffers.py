"""A few fixed buffers on the device, which copies from the host fill in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvpref.state.lanes import Lane, Lanes
from kvpref.tracing import mark

NUM_BUFFERS = 2
"""One that is read, and one that is being filled."""

_ALIGNMENT = 256

Fill = Callable[[torch.Tensor], Any]
"""Copies to a buffer's memory, given as bytes; returns what is to be known of what it copied."""


def room(num_bytes: int, num_parts: int) -> int:
    """Bytes of a buffer that holds parts of so many bytes in all."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT + num_parts * _ALIGNMENT


def carve(memory: torch.Tensor, parts: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
    """Tensors of these shapes and dtypes in a buffer's memory, one after another; at the same places in each buffer."""
    tensors, start = [], 0
    for shape, dtype in parts:
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        # Not views to autograd: their version must not change when the memory is used again.
        tensors.append(memory[start:stop].view(dtype).view(*shape).data)
        start = -(-stop // _ALIGNMENT) * _ALIGNMENT
    return tensors


class Buffer:
    """One of them.

    Attributes:
        memory: Its bytes.
        key: What it holds, or is about to.
        content: What `Fill` returned.
        filled: What to wait for before it is there; None if compute has waited.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.key: Any = None
        self.content: Any = None
        self.filled: Any = None


class Buffers:
    """`NUM_BUFFERS` of them.

    Args:
        lanes: Filled in `up`, read and allocated in `compute`.
        num_bytes: Size of each, from `room`.
        device: Where they are.
        kind: What they hold, for `kvpref.tracing.mark`.
        after: Lanes that use a buffer's memory, or write what is copied to it.
    """

    def __init__(self, lanes: Lanes, num_bytes: int, device: torch.device, kind: str, after: Sequence[Lane]) -> None:
        self._lanes, self._after = lanes, after
        self._buffers = [
            Buffer(torch.empty(num_bytes, dtype=torch.uint8, device=device)) for _ in range(NUM_BUFFERS)
        ]  # the one that was read last comes last
        mark(kind, *(buffer.memory for buffer in self._buffers))

    def read(self, key: Any, fill: Fill) -> Buffer:
        """The buffer that holds `key`, filled if none does; compute may use it until the next one is read."""
        buffer = self.find(key) or self.begin(key, fill)
        self._buffers.remove(buffer)
        self._buffers.append(buffer)
        if buffer.filled is not None:
            self._lanes.compute.wait(buffer.filled)
            buffer.filled = None
        return buffer

    def begin(self, key: Any, fill: Fill) -> Buffer:
        """Begin to fill a buffer; not the one that was read last."""
        held = self.find(key)
        if held is not None:
            return held
        buffer = self._buffers[0]
        for lane in self._after:
            self._lanes.up.wait(lane.record())
        with self._lanes.up.running():
            buffer.content = fill(buffer.memory)
        buffer.key, buffer.filled = key, self._lanes.up.record()
        return buffer

    def find(self, key: Any) -> Buffer | None:
        """The buffer that holds `key`."""
        return next((buffer for buffer in self._buffers if buffer.key == key), None)

    def around(self, tensor: torch.Tensor) -> Buffer | None:
        """The buffer in whose memory a tensor is."""
        start = tensor.untyped_storage().data_ptr()
        return next((buffer for buffer in self._buffers if start and buffer.memory.data_ptr() == start), None)
