"""Slabs: where keys and values that are read later stand, and what a chunk reads of them. Pure Python integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from kvpref.prefix.levels import VarlenLayout
from kvpref.prefix.tree import PrefixTree, Span

SHARED = -1
"""Owner of segments that sequences of several owners share."""


@dataclass(frozen=True, order=True)
class SlabKey:
    """Which slab a segment's keys and values stand in."""

    owner: int
    """The micro-batch that alone reads it, or `SHARED`."""

    depth: int
    """Of the segments in it."""

    is_prompt: bool
    """Whether no token up to its end is scored. Told apart only where prompts get no gradient."""


@dataclass(frozen=True, kw_only=True)
class SlabRead:
    """The rows [start, stop) of a slab, and which queries of a chunk see which of them."""

    slab: SlabKey
    start: int
    stop: int
    block: VarlenLayout
    key_positions: tuple[int, ...]
    """Per pair of the block, the position of its first key inside the sequences; 0 where no query sees it."""


class _Pair(NamedTuple):
    """Queries of one or more spans that see the slab rows [start, stop)."""

    num_queries: int
    start: int
    stop: int
    position: int
    """Of the first of these rows."""


def slab_reads(
    tree: PrefixTree, spans: list[Span], slab_of: list[SlabKey], rows: dict[int, int]
) -> tuple[SlabRead, ...]:
    """What the spans of a chunk read.

    Args:
        tree: The prefix tree.
        spans: In depth-first order.
        slab_of: Per segment, its slab.
        rows: First row there of each segment that is kept.
    """
    seen = [dict(_ancestor_ranges(tree, span, slab_of, rows)) for span in spans]
    reads: list[SlabRead] = []
    for key in sorted({key for ranges in seen for key in ranges}):
        pairs: list[_Pair] = []
        for span, ranges in zip(spans, seen, strict=True):
            keys = ranges.get(key, (0, 0, 0))
            num_queries = span.stop - span.start
            if pairs and keys == pairs[-1][1:]:  # one pair for all that see the same keys
                num_queries += pairs.pop().num_queries
            pairs.append(_Pair(num_queries, *keys))
        reads.append(_read(key, pairs, source=len(reads) + 1))
    return tuple(reads)


def _ancestor_ranges(
    tree: PrefixTree, span: Span, slab_of: list[SlabKey], rows: dict[int, int]
) -> Iterator[tuple[SlabKey, tuple[int, int, int]]]:
    """What a span sees in the slabs, rows and first position: its ancestors, and its own segment's pieces before it."""
    if span.start:
        first = rows[span.segment]
        yield slab_of[span.segment], (first, first + span.start, tree.segments[span.segment].start)
    parent = tree.segments[span.segment].parent
    while parent is not None:
        segment = tree.segments[parent]
        yield slab_of[parent], (rows[parent], rows[parent] + len(segment), segment.start)
        parent = segment.parent


def _read(key: SlabKey, pairs: list[_Pair], source: int) -> SlabRead:
    """One block over the rows between the first and the last that are seen; depth-first order keeps them sorted."""
    seen = [pair for pair in pairs if pair.stop > pair.start]
    position = first = seen[0].start
    queries, keys, key_positions = [], [], []
    for pair in pairs:
        if pair.stop > pair.start:
            if pair.start > position:  # rows that no query of this chunk sees
                queries.append(0)
                keys.append(pair.start - position)
                key_positions.append(0)
            position = pair.stop
        queries.append(pair.num_queries)
        keys.append(pair.stop - pair.start)
        key_positions.append(pair.position)
    block = VarlenLayout(
        cu_seqlens_q=tuple(accumulate(queries, initial=0)),
        cu_seqlens_k=tuple(accumulate(keys, initial=0)),
        shape="rectangle",
        source=source,
    )
    return SlabRead(slab=key, start=first, stop=position, block=block, key_positions=tuple(key_positions))
