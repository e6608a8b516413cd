"""A few fixed buffers on the device, filled in turn by copies from the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvpref.state.lanes import Lane, Lanes
from kvpref.tracing import mark

NUM_BUFFERS = 2
"""One is read while the other is being filled."""

_ALIGNMENT = 256

Fill = Callable[[torch.Tensor], Any]
"""Copies to a buffer's memory, given as bytes; returns a description of what it copied."""


def room(num_bytes: int, num_parts: int) -> int:
    """Size in bytes of a buffer for `num_parts` parts of `num_bytes` in total."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT + num_parts * _ALIGNMENT


def carve(memory: torch.Tensor, parts: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
    """Tensors of these shapes and dtypes in a buffer's memory, one after another, at equal offsets in each buffer."""
    tensors, start = [], 0
    for shape, dtype in parts:
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        # Not views to autograd: their version must not change when the memory is reused.
        tensors.append(memory[start:stop].view(dtype).view(*shape).data)
        start = -(-stop // _ALIGNMENT) * _ALIGNMENT
    return tensors


class Buffer:
    """One of the buffers.

    Attributes:
        memory: Its bytes.
        key: Names its content, present or arriving.
        content: What `Fill` returned.
        filled: The event after which the content is there; None if compute has waited for it.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.key: Any = None
        self.content: Any = None
        self.filled: Any = None


class Buffers:
    """`NUM_BUFFERS` buffers.

    Args:
        lanes: Buffers are filled in `up`, and read and allocated in `compute`.
        num_bytes: Size of each, from `room`.
        device: The device of the buffers.
        kind: The kind of content, for `kvpref.tracing.mark`.
        after: Lanes that use a buffer's memory, or write what is copied to it.
    """

    def __init__(self, lanes: Lanes, num_bytes: int, device: torch.device, kind: str, after: Sequence[Lane]) -> None:
        self._lanes, self._after = lanes, after
        self._buffers = [
            Buffer(torch.empty(num_bytes, dtype=torch.uint8, device=device)) for _ in range(NUM_BUFFERS)
        ]  # the most recently read comes last
        mark(kind, *(buffer.memory for buffer in self._buffers))

    def read(self, key: Any, fill: Fill) -> Buffer:
        """The buffer that holds `key`, filled if necessary; compute may use it until the next one is read."""
        buffer = self.find(key) or self.begin(key, fill)
        self._buffers.remove(buffer)
        self._buffers.append(buffer)
        if buffer.filled is not None:
            self._lanes.compute.wait(buffer.filled)
            buffer.filled = None
        return buffer

    def begin(self, key: Any, fill: Fill) -> Buffer:
        """Begin to fill a buffer other than the one read last."""
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
        """The buffer that holds `key`; None if there is none."""
        return next((buffer for buffer in self._buffers if buffer.key == key), None)

    def around(self, tensor: torch.Tensor) -> Buffer | None:
        """The buffer whose memory contains a tensor; None if there is none."""
        start = tensor.untyped_storage().data_ptr()
        return next((buffer for buffer in self._buffers if start and buffer.memory.data_ptr() == start), None)
