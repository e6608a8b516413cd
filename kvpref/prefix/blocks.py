"""Attention blocks as integers: which rows see which, as pairs of a query range and a key range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Literal, NamedTuple

from kvpref.prefix.runs import Runs

Shape = Literal["rectangle", "causal", "anti_causal"]
"""Which keys of its pair query i sees: all; keys up to and including i; keys from i on. The last two are
squares: a pair has as many queries as keys."""


class Pair(NamedTuple):
    """Query rows [query, query + num_queries) that see key rows [key, key + num_keys)."""

    query: int
    num_queries: int
    key: int
    num_keys: int


@dataclass(frozen=True, kw_only=True)
class VarlenLayout:
    """One varlen attention block: pairs of a query range and a key range, all of one shape.

    Every query row is in at most one pair.

    Attributes:
        cu_seqlens_q: Row offsets of the queries, one more entry than pairs: pair i has [q[i], q[i+1]). Pairs may have
            no queries.
        cu_seqlens_k: Row offsets of the keys, likewise.
        shape: What a query sees of its pair's keys.
        source: Where the keys are: 0 for the pass's own rows, i for those of prefix i - 1.
        key_starts: Per pair, the first row of its keys in the source, where ranges overlap or leave rows out; its
            length is that of `cu_seqlens_k`, which then counts rows that were gathered one range after another. None
            where pair i's keys are the rows [k[i], k[i+1]) of the source.
        window: In a causal block whose queries are its keys, query q sees key k only where q - k < window.
    """

    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]
    shape: Shape
    source: int = 0
    key_starts: tuple[int, ...] | None = None
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlacedBlocks:
    """The attention blocks of one row of segments under the causal rule, and where their tokens stand in the sequences.

    Attributes:
        self_block: Each segment over itself, causal; its offsets say where each segment's rows are.
        cross_blocks: Segments that continue a run of a prefix's rows, over that run. Several for one prefix if segments
            branch off at different rows of a run: each sees all runs before.
        query_positions: Per segment, the position of its first token inside the sequences.
        key_positions: Per cross block and pair of it, the position of the pair's first key; 0 where it has no keys.
        spans: Runs of rows [first, stop), each inside one segment, that see one another in both directions where a rule
            says so.
    """

    self_block: VarlenLayout
    cross_blocks: tuple[VarlenLayout, ...]
    query_positions: tuple[int, ...]
    key_positions: tuple[tuple[int, ...], ...]
    spans: Runs = ()

    @property
    def num_rows(self) -> int:
        """T_d, the rows of the level."""
        return self.self_block.cu_seqlens_q[-1]


def cover_rows(pairs: Iterable[Pair], num_rows: tuple[int, int], shape: Shape, source: int) -> Iterator[VarlenLayout]:
    """One block of these pairs, or none if nothing is seen.

    Args:
        pairs: In the order of their queries, each query at most once.
        num_rows: Numbers of query rows and of source rows.
        shape: The shape of all pairs.
        source: Where the keys are.
    """
    kept = list(_merged((pair for pair in pairs if pair.num_queries and pair.num_keys), shape))
    if not kept:
        return
    in_order = all(before.key + before.num_keys <= after.key for before, after in pairwise(kept))
    queries, keys, starts = [], [], []
    row = key = 0
    for pair in (*kept, Pair(num_rows[0], 0, num_rows[1], 0)):
        if pair.query > row:  # rows that see nothing here
            queries.append(pair.query - row)
            keys.append(0)
            starts.append(pair.key)
        if in_order and pair.key > key:  # rows of the source that nothing sees
            queries.append(0)
            keys.append(pair.key - key)
            starts.append(key)
        if pair.num_queries:
            queries.append(pair.num_queries)
            keys.append(pair.num_keys)
            starts.append(pair.key)
        row, key = pair.query + pair.num_queries, pair.key + pair.num_keys
    yield VarlenLayout(
        cu_seqlens_q=offsets(queries),
        cu_seqlens_k=offsets(keys),
        shape=shape,
        source=source,
        key_starts=None if in_order else tuple(starts),
    )


def nested_blocks(pairs: Iterable[Pair], num_rows: tuple[int, int], source: int) -> Iterator[VarlenLayout]:
    """Rectangles whose key ranges do not overlap, in as few blocks as possible.

    Segments that branch off at m places of one run see its beginning up to there: m ranges that begin at the same row,
    one inside the next. Kernels take key ranges that do not overlap. So the run is cut at the m places, and segment k
    sees its k pieces by the binary digits of k: for each 1 a range of as many pieces as the digit stands for. A digit's
    ranges are equal or apart, so each digit is one block, and there are log2(m) of them.

    Args:
        pairs: In the order of their queries, each query at most once. Those that begin at one row are neighbours, the
            shorter ones first; those that begin at different rows do not overlap.
        num_rows: Of queries, and of the source.
        source: Where the keys are.
    """
    runs = [list(own) for _, own in groupby((pair for pair in pairs if pair.num_keys), key=lambda pair: pair.key)]
    cuts = [[0, *sorted({pair.num_keys for pair in own})] for own in runs]
    for digit in reversed(range(max(map(len, cuts), default=1).bit_length())):
        yield from cover_rows(_of_digit(runs, cuts, digit), num_rows, "rectangle", source)


def _of_digit(runs: list[list[Pair]], cuts: list[list[int]], digit: int) -> Iterator[Pair]:
    for own, places in zip(runs, cuts, strict=True):
        for query, num_queries, key, num_keys in own:
            number = places.index(num_keys)
            if number >> digit & 1:
                before = number >> digit + 1 << digit + 1
                first, stop = places[before], places[before + (1 << digit)]
                yield Pair(query, num_queries, key + first, stop - first)


def _merged(pairs: Iterable[Pair], shape: Shape) -> Iterator[Pair]:
    """The pairs, with neighbours that see the same keys merged."""
    last: Pair | None = None
    for pair in pairs:
        if last and shape == "rectangle" and pair == (last.query + last.num_queries, pair.num_queries, *last[2:]):
            last = Pair(last.query, last.num_queries + pair.num_queries, *last[2:])
            continue
        if last:
            yield last
        last = pair
    if last:
        yield last


def offsets(lengths: Iterable[int]) -> tuple[int, ...]:
    """Where runs of these lengths begin, and the last one's end."""
    return tuple(accumulate(lengths, initial=0))


def block_pairs(block: VarlenLayout) -> Iterator[tuple[int, int, int]]:
    """Per pair its queries, its keys, and the first row of its keys."""
    starts: AbstractSequence[int] = block.cu_seqlens_k[:-1] if block.key_starts is None else block.key_starts
    queries, keys = (([b - a for a, b in pairwise(rows)]) for rows in (block.cu_seqlens_q, block.cu_seqlens_k))
    yield from zip(queries, keys, starts, strict=True)
