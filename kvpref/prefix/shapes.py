"""Masks as shapes: what a rule leaves of a level's blocks, as rectangles and causal or anti-causal squares.

A query that sees the last W tokens sees a band of keys, and a band between two runs of tokens is a rectangle and a
triangle. So attention kernels need no notion of windows, and compute no more pairs than the mask has.
Shape legend: a run is the rows of one segment, or of a piece of one, in a level.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from kvpref.prefix.blocks import Pair, PlacedBlocks, VarlenLayout, cover_rows, offsets
from kvpref.prefix.rules import Rule


class _Meeting(NamedTuple):
    """A run of queries and the run of earlier keys that it sees under the causal rule; rows and positions."""

    query: int
    num_queries: int
    query_position: int
    key: int
    num_keys: int
    key_position: int

    @property
    def key_end(self) -> int:
        """Position after the last key."""
        return self.key_position + self.num_keys

    def pair(self, queries: tuple[int, int], positions: tuple[int, int]) -> Pair:
        """Queries [first, stop) of the run over the keys at positions [first, stop)."""
        first, stop = queries
        return Pair(self.query + first, stop - first, self.key + positions[0] - self.key_position, _length(positions))


def blocks_under(level: PlacedBlocks, rule: Rule) -> tuple[VarlenLayout, ...]:
    """The blocks of a level under a rule: over its own rows first, then over each prefix.

    A prefix of which no row is seen has no block. Each pair of a query and a key that the rule lets meet is in exactly
    one block.

    Args:
        level: Its blocks under the causal rule, and the positions of their rows.
        rule: Causal, window or chunk; dense with its ranges.
    """
    if rule.bidirectional:
        backwards = replace(rule, bidirectional=False, whole_spans=False)
        return (*blocks_under(level, backwards), *_span_blocks(level, rule))
    if rule.kind == "causal":
        return (level.self_block, *level.cross_blocks)
    if rule.kind == "dense":
        return tuple(_dense_blocks(level, rule))
    blocks = [_SELF_BLOCKS[rule.kind](level, rule.size)]
    for block, key_positions in zip(level.cross_blocks, level.key_positions, strict=True):
        meetings = list(_meetings(level, block, key_positions))
        if all(rule.first_key(run.query_position + run.num_queries - 1) <= run.key_position for run in meetings):
            blocks.append(block)  # unchanged: the rule takes nothing away
        else:
            blocks.extend(_CROSS_BLOCKS[rule.kind](meetings, block, rule.size))
    return tuple(blocks)


def window_blocks(cu_seqlens: AbstractSequence[int], window: int) -> tuple[VarlenLayout, ...]:
    """Causal self attention of packed segments inside a window, as blocks without one.

    Strips of `window` rows: each over itself is a causal square; over the strip before it an anti-causal square of one
    row less, of which a last, shorter strip leaves a smaller square and a rectangle.

    Args:
        cu_seqlens: Row offsets of the segments, one more than segments.
        window: A query sees this many tokens, itself included.
    """
    strips: list[int] = []
    anti, rectangles = [], []
    for start, stop in pairwise(cu_seqlens):
        strips.extend(min(window, stop - first) for first in range(start, stop, window))
        for first in range(start + window, stop, window):
            rows = min(window - 1, stop - first)
            keys = first - window + 1
            anti.append(Pair(first, rows, keys, rows))
            rectangles.append(Pair(first, rows, keys + rows, window - 1 - rows))
    own = offsets(strips)
    total = (cu_seqlens[-1], cu_seqlens[-1])
    blocks = [VarlenLayout(cu_seqlens_q=own, cu_seqlens_k=own, shape="causal")]
    blocks.extend(cover_rows(anti, total, "anti_causal", source=0))
    blocks.extend(cover_rows(rectangles, total, "rectangle", source=0))
    return tuple(blocks)


def _meetings(level: PlacedBlocks, block: VarlenLayout, key_positions: AbstractSequence[int]) -> Iterator[_Meeting]:
    for (start, stop), position in zip(pairwise(level.self_block.cu_seqlens_q), level.query_positions, strict=True):
        pair = bisect_right(block.cu_seqlens_q, start) - 1
        first, last = block.cu_seqlens_k[pair : pair + 2]
        if last > first:
            yield _Meeting(start, stop - start, position, first, last - first, key_positions[pair])


def _window_self_block(level: PlacedBlocks, size: int) -> VarlenLayout:
    longest = max(stop - start for start, stop in pairwise(level.self_block.cu_seqlens_q))
    return replace(level.self_block, window=size) if longest > size else level.self_block


def _span_blocks(level: PlacedBlocks, rule: Rule) -> Iterator[VarlenLayout]:
    """What spans see in addition: later tokens, and those before the window where spans are seen whole."""
    total = (level.num_rows, level.num_rows)
    later = (Pair(first, stop - first - 1, first + 1, stop - first - 1) for first, stop in level.spans)
    yield from cover_rows(later, total, "anti_causal", source=0)
    if rule.whole_spans:
        long = [(first, stop) for first, stop in level.spans if stop - first > rule.size]
        num_rows = [stop - first - rule.size for first, stop in long]
        before = (Pair(first + rule.size, rows, first, rows) for (first, _), rows in zip(long, num_rows, strict=True))
        yield from cover_rows(before, total, "causal", source=0)


def _chunk_self_block(level: PlacedBlocks, size: int) -> VarlenLayout:
    """Each segment cut where chunks begin."""
    rows: list[int] = []
    for (start, stop), position in zip(pairwise(level.self_block.cu_seqlens_q), level.query_positions, strict=True):
        end = position + stop - start
        cuts = [position, *range((position // size + 1) * size, end, size), end]
        rows.extend(after - before for before, after in pairwise(cuts))
    own = offsets(rows)
    return replace(level.self_block, cu_seqlens_q=own, cu_seqlens_k=own)


def _window_cross_blocks(meetings: list[_Meeting], block: VarlenLayout, size: int) -> Iterator[VarlenLayout]:
    rectangles: list[Pair] = []
    anti: list[Pair] = []
    for run in meetings:
        first_seen = run.query_position - size + 1  # by the first query
        last_seen = first_seen + run.num_queries - 1  # first key of the last query: all queries see what comes after it
        start, stop = max(run.key_position, first_seen), min(run.key_end, last_seen)
        if start >= stop:
            keys = (min(max(run.key_position, last_seen), run.key_end), run.key_end)
            rectangles.append(run.pair((0, run.num_queries), keys))
            continue
        num_all = start - first_seen  # queries that see all keys from `start` on
        rectangles.append(run.pair((0, num_all), (start, run.key_end)))
        rectangles.append(run.pair((num_all, run.num_queries), (stop, run.key_end)))
        anti.append(run.pair((num_all, num_all + stop - start), (start, stop)))
    total = (block.cu_seqlens_q[-1], block.cu_seqlens_k[-1])
    yield from cover_rows(rectangles, total, "rectangle", block.source)
    yield from cover_rows(anti, total, "anti_causal", block.source)


def _chunk_cross_blocks(meetings: list[_Meeting], block: VarlenLayout, size: int) -> Iterator[VarlenLayout]:
    pairs = []
    for run in meetings:
        chunk = run.query_position // size
        num_queries = min(run.num_queries, (chunk + 1) * size - run.query_position)
        keys = (min(max(run.key_position, chunk * size), run.key_end), run.key_end)
        pairs.append(run.pair((0, num_queries), keys))
    yield from cover_rows(pairs, (block.cu_seqlens_q[-1], block.cu_seqlens_k[-1]), "rectangle", block.source)


def _dense_blocks(level: PlacedBlocks, rule: Rule) -> Iterator[VarlenLayout]:
    """Row by row: the first range of keys that each query sees, then the second, and so on."""
    own = level.self_block
    runs = zip(pairwise(own.cu_seqlens_q), level.query_positions, strict=True)
    sources = [(own, [_Meeting(q, stop - q, position, q, stop - q, position) for (q, stop), position in runs])]
    for block, positions in zip(level.cross_blocks, level.key_positions, strict=True):
        sources.append((block, list(_meetings(level, block, positions))))
    for block, meetings in sources:
        rows = [
            [
                run.pair((row, row + 1), (max(first, run.key_position), min(stop, run.key_end)))
                for first, stop in rule.ranges[run.query_position + row]
                if max(first, run.key_position) < min(stop, run.key_end)
            ]
            for run in meetings
            for row in range(run.num_queries)
        ]
        for place in range(max(map(len, rows), default=0)):
            pairs = (row[place] for row in rows if len(row) > place)
            total = (block.cu_seqlens_q[-1], block.cu_seqlens_k[-1])
            yield from cover_rows(pairs, total, "rectangle", block.source)


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


_SELF_BLOCKS = {"window": _window_self_block, "chunk": _chunk_self_block}
_CROSS_BLOCKS = {"window": _window_cross_blocks, "chunk": _chunk_cross_blocks}
