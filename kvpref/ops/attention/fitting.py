"""Blocks rewritten into the form that a backend's kernels take.

Kernels without windows get squares and rectangles, those without anti-causal squares get causal ones with both orders
reversed, and those that take keys from offsets alone get gathered keys and values: gathered again in the backward pass,
never kept. All of this is decided on the host, once for all layers.

Shape legend: T queries, P rows of the source, K keys of the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from kvpref.ops.attention.backends.interface import Abilities
from kvpref.ops.attention.block import BlockKind, VarlenBlock, read_offsets
from kvpref.prefix.shapes import window_blocks
from kvpref.records.host_copies import to_device


def without_windows(blocks: Iterable[VarlenBlock], can: Abilities) -> Iterator[VarlenBlock]:
    """The blocks, with each windowed one replaced by several without a window if kernels have none."""
    for block in blocks:
        if block.window is None or can.windows:
            yield block
        else:
            yield from _squares(block.offsets_key, block.window, block.cu_seqlens_q.device)


@lru_cache(maxsize=32)  # every layer of a pass asks for the same few blocks, forward and backward
def _squares(offsets_key: bytes, window: int, device: torch.device) -> tuple[VarlenBlock, ...]:
    layouts = window_blocks(read_offsets(offsets_key)[0].tolist(), window)
    # Cached between calls, so never fake tensors, nor inference tensors, which no backward pass may read.
    with _disable_current_modes(), torch.inference_mode(False):
        return tuple(VarlenBlock.from_layout(layout, device) for layout in layouts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A block as kernels take it, and the mapping of its rows from and to the full tensors.

    Attributes:
        block: The block passed to the kernels.
        key_rows: (K,) int64 on the device, or a range: the rows of the source that are its keys. None for all, in
            their order.
        is_reversed: Whether its queries come in reversed order, and its keys if `key_rows` is not a tensor.
    """

    block: VarlenBlock
    key_rows: torch.Tensor | slice | None = None
    is_reversed: bool = False

    def queries(self, rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Rows of queries, outputs or their gradients; the mapping is its own inverse."""
        return rows.flip(dim) if self.is_reversed else rows

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        """(P, ...) -> (K, ...)."""
        if isinstance(self.key_rows, torch.Tensor):
            return rows[self.key_rows]
        taken = rows if self.key_rows is None else rows[self.key_rows]
        return taken.flip(0) if self.is_reversed else taken

    def gradient_of_keys(self, grad: torch.Tensor, num_rows: int) -> torch.Tensor:
        """(K, ...) -> (P, ...), in fp32 or wider if several keys are the same row of the source."""
        if isinstance(self.key_rows, torch.Tensor):
            wide = grad if grad.dtype == torch.float64 else grad.float()
            return wide.new_zeros((num_rows, *grad.shape[1:])).index_add_(0, self.key_rows, wide)
        grad = grad.flip(0) if self.is_reversed else grad
        if self.key_rows is None:
            return grad
        whole = grad.new_zeros((num_rows, *grad.shape[1:]))
        whole[self.key_rows] = grad
        return whole


def fit(block: VarlenBlock, can: Abilities) -> Fitted:
    """The form of a block for kernels with these abilities."""
    gathers = block.starts_key is not None and not can.key_ranges
    reverses = block.shape == "anti_causal" and not can.anti_causal
    if not gathers and not reverses:
        return Fitted(block=block)
    assert gathers or block.starts_key is None, (
        "kernels that take key ranges in place must take anti-causal squares too"
    )
    return _fitted(block.offsets_key, block.starts_key, block.kind, reverses, block.cu_seqlens_q.device)


@lru_cache(maxsize=64)  # as above
def _fitted(
    offsets_key: bytes, starts_key: bytes | None, kind: BlockKind, reverses: bool, device: torch.device
) -> Fitted:
    offsets = read_offsets(offsets_key)
    rows = None if starts_key is None else _key_rows(offsets[1], np.frombuffer(starts_key, dtype=np.int32))
    if reverses:
        offsets = (offsets[:, -1:] - offsets)[:, ::-1].copy()
        kind = replace(kind, shape="causal")
    with _disable_current_modes(), torch.inference_mode(False):
        cu_seqlens = to_device(torch.from_numpy(offsets.copy()), device)
        block = VarlenBlock.from_offsets(offsets.tobytes(), cu_seqlens, kind)
        return Fitted(block=block, key_rows=_on_device(rows, reverses, device), is_reversed=reverses)


def _key_rows(offsets: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(K,) the source row of each key."""
    shifts = np.repeat(starts.astype(np.int64) - offsets[:-1], np.diff(offsets))
    return shifts + np.arange(offsets[-1])


def _on_device(rows: np.ndarray | None, reverses: bool, device: torch.device) -> torch.Tensor | slice | None:
    if rows is None:
        return None
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return slice(int(rows[0]), int(rows[0]) + len(rows))  # a view, no copy
    return to_device(torch.from_numpy(rows[::-1].copy() if reverses else rows), device)
