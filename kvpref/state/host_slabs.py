"""Slabs in host memory: keys or values of one layer, and the sums of the gradients from their readers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvpref.tracing import mark


class HostSlab:
    """One tensor of keys or values in host memory, page-locked if the model is on CUDA.

    Only the device reads and writes it, in its lanes; its content is undefined for the host.

    Attributes:
        data: (rows, num_kv_heads, head_dim).
        sums: The gradients added up so far, in fp32 or wider; None before the first.
        wide: The dtype of the sums.
        is_locked: Whether the memory is page-locked.

    Args:
        num_rows: Number of rows.
        like: (any, num_kv_heads, head_dim), a tensor of the kind it will hold, on the device.
    """

    def __init__(self, num_rows: int, like: torch.Tensor) -> None:
        shape = (num_rows, *like.shape[1:])
        self.is_locked = like.is_cuda
        self.data = torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=self.is_locked)
        self.sums: torch.Tensor | None = None
        # Many chunks add to the same rows; 16-bit sums would lose what each of them adds.
        self.wide = torch.promote_types(like.dtype, torch.float32)
        mark("prefix K/V", self.data)


class HostRows(NamedTuple):
    """The rows [start, stop) of a slab."""

    slab: HostSlab
    start: int
    stop: int
    needs_grad: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, num_kv_heads, head_dim)."""
        return (self.stop - self.start, *self.slab.data.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's keys or values."""
        return self.slab.data[0].nbytes

    @property
    def row_sum_bytes(self) -> int:
        """Bytes of one row's sums."""
        return self.slab.data[0].numel() * self.slab.wide.itemsize

    @property
    def data(self) -> torch.Tensor:
        """The keys or values."""
        return self.slab.data[self.start : self.stop]

    @property
    def sums(self) -> torch.Tensor | None:
        """The sums of their gradients so far; None if there are none."""
        return None if self.slab.sums is None else self.slab.sums[self.start : self.stop]

    def make_sums(self) -> torch.Tensor:
        """`sums`, for writing; where there were none, the content is undefined."""
        slab = self.slab
        if slab.sums is None:
            # The host may write zeros at once: page-locked memory is not reallocated while a device uses it.
            covers = self.stop - self.start == len(slab.data)
            make = torch.empty if covers else torch.zeros
            slab.sums = make(slab.data.shape, dtype=slab.wide, device="cpu", pin_memory=slab.is_locked)
            mark("prefix K/V gradients", slab.sums)
        return slab.sums[self.start : self.stop]


HostPair = tuple[HostRows, HostRows]
"""Keys and values."""

HostLayer = tuple[HostRows, ...]
"""Rows that one layer of a chunk reads or leaves: keys, values, keys, values, ..."""
