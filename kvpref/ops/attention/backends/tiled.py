"""`tiled`: attention in plain torch, some queries at a time: memory is bounded, and masked tiles are skipped."""

from __future__ import annotations

from collections.abc import Iterator

from kvpref.ops.attention.backends.plain_torch import PlainTorch, Tile
from kvpref.ops.attention.block import Pair, VarlenBlock

MAX_SCORES = 2**24
"""Most scores of a tile over all heads, unless one query has more: 64 MiB in fp32, of which a few copies exist."""


class Tiled(PlainTorch):
    """The fallback where no kernel serves: softcap without a package, fp64 on a GPU, odd head dims."""

    name = "tiled"
    cost = "no fused kernel: scores of some queries at a time are written to memory, and arithmetic is in fp32"

    def tiles(self, block: VarlenBlock, num_heads: int) -> Iterator[Tile]:
        for pair in block.pairs:
            yield from _tiles(pair, block, num_heads)


def _tiles(pair: Pair, block: VarlenBlock, num_heads: int) -> Iterator[Tile]:
    q0, q1, k0, k1 = pair
    num_queries, num_keys = q1 - q0, k1 - k0
    # A window makes a tile as wide as its rows and the window together.
    width = num_keys if block.window is None else min(num_keys, 2 * block.window)
    rows = max(1, MAX_SCORES // (num_heads * width))
    if block.window is not None:
        rows = min(rows, max(block.window, 1))
    for first in range(0, num_queries, rows):
        stop = min(first + rows, num_queries)
        start, end = _seen(block, first, stop, num_keys)
        yield Tile(q0 + first, q0 + stop, k0 + start, k0 + end, first, start)


def _seen(block: VarlenBlock, first: int, stop: int, num_keys: int) -> tuple[int, int]:
    """The keys of a pair that its queries [first, stop) see, from the first to the one after the last."""
    if block.shape == "rectangle":
        return 0, num_keys
    if block.shape == "anti_causal":
        return first, num_keys
    return 0 if block.window is None else max(0, first - block.window + 1), stop
