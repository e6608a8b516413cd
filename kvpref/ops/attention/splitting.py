"""Which pairs of a block go into one kernel launch: planned on the host, from lengths alone.

A launch over many pairs starts as many thread blocks for each pair as for the longest, and pads its workspace pair by
pair. Where much of that is wasted, a block runs as several launches over consecutive pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvpref.ops.attention.block import read_offsets

Ints = NDArray[np.int64]
PairRange = tuple[int, int]
"""The pairs [first, stop)."""

MIN_EMPTY_BLOCKS = 2**15
"""Empty thread blocks that a further launch must save. Not measured: a GPU starts a few hundred per microsecond, and a
launch with its copies takes tens of microseconds."""
MAX_WASTED_BYTES = 256 * 2**20
"""Workspace that one launch may waste on padding, unless the useful part is larger."""
_TILE_ROWS = 128
"""Queries or keys of one thread block in FlashAttention's kernels."""


@dataclass(frozen=True, kw_only=True)
class CallLimits:
    """How the cost of a launch grows with its pairs, for a backend's kernels and one shape of heads."""

    num_heads: int
    """Thread blocks per tile of rows."""

    row_bytes: int
    """Workspace of the backward pass per query row, in bytes."""

    pair_rows: int | None = None
    """Rows by which the workspace grows for each pair; None if each pair takes as many rows as the longest."""

    max_start_row: int | None = None
    """A pair must start before this row of its launch's workspace; None for any."""


@lru_cache(maxsize=256)  # every layer of a pass asks for the same few blocks, forward and backward
def split_pairs(offsets_key: bytes, limits: CallLimits) -> tuple[PairRange, ...]:
    """Consecutive ranges of pairs, one launch each; a single range if splitting gains nothing.

    Args:
        offsets_key: The block's `VarlenBlock.offsets_key`.
        limits: The limits of the backend that runs it.
    """
    offsets = read_offsets(offsets_key).astype(np.int64)
    lengths = np.diff(offsets)
    ranges = _by_thread_blocks(-(-lengths // _TILE_ROWS), (0, lengths.shape[1]), limits)
    ranges = [part for whole in ranges for part in _by_workspace(lengths[0], whole, limits)]
    return tuple(part for whole in ranges for part in _by_start_row(offsets[0], whole, limits))


def _by_thread_blocks(tiles: Ints, pairs: PairRange, limits: CallLimits) -> list[PairRange]:
    """Cut repeatedly where it saves the most thread blocks, as long as it saves enough; tiles are (2, num_pairs)."""
    start, stop = pairs
    if stop - start < 2:
        return [pairs]
    own = tiles[:, start:stop]
    counts = np.arange(1, stop - start)
    before = np.maximum.accumulate(own, axis=1).sum(axis=0)[:-1] * counts
    after = np.maximum.accumulate(own[:, ::-1], axis=1).sum(axis=0)[::-1][1:] * counts[::-1]
    cut = int(np.argmin(before + after))
    whole = int(own.max(axis=1).sum()) * (stop - start)
    saved = (whole - int(before[cut] + after[cut])) * limits.num_heads
    if saved < MIN_EMPTY_BLOCKS:
        return [pairs]
    middle = start + cut + 1
    return [*_by_thread_blocks(tiles, (start, middle), limits), *_by_thread_blocks(tiles, (middle, stop), limits)]


def _by_workspace(lengths: Ints, pairs: PairRange, limits: CallLimits) -> list[PairRange]:
    """Cut into parts that waste equally until none wastes too much; lengths are those of the queries."""
    start, stop = pairs
    own = lengths[start:stop]
    wasted = _wasted_rows(own, limits)[-1] * limits.row_bytes
    if stop - start < 2 or wasted <= max(MAX_WASTED_BYTES, int(own.sum()) * limits.row_bytes):
        return [pairs]
    before, after = _wasted_rows(own, limits)[:-1], _wasted_rows(own[::-1], limits)[::-1][1:]
    middle = start + int(np.argmin(np.maximum(before, after))) + 1
    return [*_by_workspace(lengths, (start, middle), limits), *_by_workspace(lengths, (middle, stop), limits)]


def _wasted_rows(lengths: Ints, limits: CallLimits) -> Ints:
    """Padding rows of the workspace for the first pair, the first two, and so on."""
    counts = np.arange(1, len(lengths) + 1)
    if limits.pair_rows is not None:
        return counts * limits.pair_rows
    wasted: Ints = np.maximum.accumulate(lengths) * counts - np.cumsum(lengths)
    return wasted


def _by_start_row(offsets: Ints, pairs: PairRange, limits: CallLimits) -> list[PairRange]:
    """Cut before each pair whose accumulator would start too far behind its launch's first one."""
    start, stop = pairs
    if limits.max_start_row is None:
        return [pairs]
    # Releases differ in whether they also count the padding of earlier pairs in 32 bits.
    starts = offsets[:stop] + np.arange(stop) * (limits.pair_rows or 0)
    ranges: list[PairRange] = []
    while starts[stop - 1] - starts[start] >= limits.max_start_row:
        middle = int(np.searchsorted(starts, starts[start] + limits.max_start_row))
        ranges.append((start, middle))
        start = middle
    return [*ranges, (start, stop)]
