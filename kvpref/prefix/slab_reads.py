"""Slabs: where keys and values that are read later stand, and what a chunk reads of them. All integers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from sys import maxsize
from typing import NamedTuple

from kvpref.prefix.blocks import Pair, VarlenLayout, block_pairs, nested_blocks
from kvpref.prefix.tree import NO_PARENT, PrefixTree, Span

SHARED = -1
"""Owner of segments that sequences of several owners share."""


@dataclass(frozen=True, order=True)
class SlabKey:
    """Which slab a segment's keys and values stand in."""

    owner: int
    """The only micro-batch that reads it, or `SHARED`."""

    depth: int
    """Depth of the segments in it."""

    is_prompt: bool
    """Whether no token up to its end is scored; tracked only where prompts get no gradient."""


@dataclass(frozen=True, kw_only=True)
class SlabRead:
    """The rows [start, stop) of a slab, and which queries of a chunk see which of them."""

    slab: SlabKey
    start: int
    stop: int
    blocks: tuple[VarlenLayout, ...]
    key_positions: tuple[tuple[int, ...], ...]
    """Per block and pair, the position of the pair's first key inside the sequences; 0 where no query sees it."""


class _Seen(NamedTuple):
    """The slab rows [start, stop) that queries see, the first of which stands at `position`."""

    start: int
    stop: int
    position: int


class SlabReader:
    """Finds what chunks read.

    Args:
        tree: The prefix tree.
        slab_of: Per segment, its slab.
        rows: First row in the slab of each segment that is kept.
    """

    def __init__(self, tree: PrefixTree, slab_of: list[SlabKey], rows: Mapping[int, int]) -> None:
        self._slab_of, self._rows = slab_of, rows
        self._parents, self._starts = tree.parents.tolist(), tree.starts.tolist()

    def reads(self, spans: list[Span]) -> tuple[SlabRead, ...]:
        """What the spans of a chunk, in depth-first order, read."""
        seen = [dict(self._seen_by(span)) for span in spans]
        num_rows = sum(span.stop - span.start for span in spans)
        reads: list[SlabRead] = []
        for key in sorted({key for ranges in seen for key in ranges}):
            pairs: dict[_Seen, tuple[int, int]] = {}  # queries that see the same are neighbours
            row = 0
            for span, ranges in zip(spans, seen, strict=True):
                num_queries = span.stop - span.start
                if key in ranges:
                    first, before = pairs.get(ranges[key], (row, 0))
                    pairs[ranges[key]] = (first, before + num_queries)
                row += num_queries
            reads.append(_read(key, pairs, num_rows, source=len(reads) + 1))
        return tuple(reads)

    def _seen_by(self, span: Span) -> Iterator[tuple[SlabKey, _Seen]]:
        """What a span sees in the slabs: its ancestors, and its own segment's pieces before it."""
        index, stop = span.segment, self._starts[span.segment] + span.start
        if not span.start:
            index = self._parents[index]
        while index != NO_PARENT:
            first, position = self._rows[index], self._starts[index]
            yield self._slab_of[index], _Seen(first, first + stop - position, position)
            index, stop = self._parents[index], position


def _read(key: SlabKey, seen: Mapping[_Seen, tuple[int, int]], num_queries: int, source: int) -> SlabRead:
    """Blocks over the rows between the first and the last that are seen; depth-first order keeps them sorted."""
    first, stop = min(own.start for own in seen), max(own.stop for own in seen)
    pairs = [Pair(*queries, own.start - first, own.stop - own.start) for own, queries in seen.items()]
    positions = sorted({(own.start - first, own.position) for own in seen})
    blocks = tuple(nested_blocks(pairs, (num_queries, stop - first), source))
    return SlabRead(
        slab=key,
        start=first,
        stop=stop,
        blocks=blocks,
        key_positions=tuple(tuple(_positions(block, positions)) for block in blocks),
    )


def _positions(block: VarlenLayout, positions: list[tuple[int, int]]) -> Iterator[int]:
    for _, num_keys, row in block_pairs(block):
        place = bisect_right(positions, (row, maxsize)) - 1
        first, position = positions[max(place, 0)]
        yield position + row - first if num_keys else 0
