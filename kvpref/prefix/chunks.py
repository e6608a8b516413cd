"""Chunks: a prefix tree cut into forward passes of bounded size.

Where `kvpref.prefix.levels` runs all segments of one depth in one pass, a chunk runs some of them, at most so many
tokens, and a segment longer than that is cut into pieces that run one after another. Keys and values of segments that
are read later stand in slabs. Pure Python integers. Shape legend: T tokens of a chunk, P its predictor rows, U unique
scored tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from kvpref.prefix.both_ways import Runs, cut, runs_in_rows, segment_runs
from kvpref.prefix.images import FeatureRun, feature_rows
from kvpref.prefix.levels import LevelLayout, PlacedBlocks, VarlenLayout, prompt_segments
from kvpref.prefix.occurrences import Occurrences, count_holders, occurrences_of
from kvpref.prefix.segments import ChunkStates, StatePlaces
from kvpref.prefix.slab_reads import SHARED, SlabKey, SlabRead, slab_reads
from kvpref.prefix.tree import PrefixTree, Span


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Segments of one depth, or pieces of them, that run in one forward pass.

    Attributes:
        slab: Where its keys and values go if they are kept, and how deep it is.
        slab_start: First of its T rows there; None where nothing reads its keys and values later.
        input_ids: (T,) token ids.
        position_ids: (T,) positions inside the sequences.
        self_block: Each span over itself, causal.
        reads: One block per slab that holds ancestors, or earlier pieces, of its spans.
        predictor_rows: (P,) rows whose hidden state predicts a scored token.
        targets: (P,) the token ids they predict.
        logp_index: (P,) where their log-probs go among the U of the whole layout.
        occurrences: How often its rows occur in the sequences.
        states: What its spans begin with and leave in layers that carry a state from token to token.
        spans: Runs of its rows that may see one another in both directions; see `PlacedBlocks`.
        image_rows: (M,) rows that stand for images.
        image_index: (M,) the rows of the table of features that stand there.
        holders: Per span, a sequence that holds it.
    """

    slab: SlabKey
    slab_start: int | None
    input_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    self_block: VarlenLayout
    reads: tuple[SlabRead, ...]
    predictor_rows: tuple[int, ...]
    targets: tuple[int, ...]
    logp_index: tuple[int, ...]
    occurrences: Occurrences
    states: ChunkStates
    spans: Runs
    image_rows: tuple[int, ...]
    image_index: tuple[int, ...]
    holders: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def placed(self) -> PlacedBlocks:
        """Its blocks, and where their tokens stand in the sequences."""
        starts = self.self_block.cu_seqlens_q[:-1]
        return PlacedBlocks(
            self_block=self.self_block,
            cross_blocks=tuple(read.block for read in self.reads),
            query_positions=tuple(self.position_ids[start] for start in starts),
            key_positions=tuple(read.key_positions for read in self.reads),
            spans=self.spans,
        )


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """All chunks of a tree.

    Attributes:
        chunks: Owner -> its chunks in an order in which they can run: `SHARED` first, then owner after owner.
        slab_rows: Rows of each slab.
        slab_states: States of each slab.
    """

    chunks: Mapping[int, tuple[Chunk, ...]]
    slab_rows: Mapping[SlabKey, int]
    slab_states: Mapping[SlabKey, int]


def build_chunks(
    tree: PrefixTree,
    layout: LevelLayout,
    owners: AbstractSequence[int],
    *,
    max_tokens: int | None,
    scored: AbstractSequence[AbstractSequence[bool]] | None = None,
    spans: AbstractSequence[Runs] | None = None,
    images: AbstractSequence[AbstractSequence[FeatureRun]] = (),
) -> ChunkLayout:
    """Cut a tree into chunks.

    Args:
        tree: The prefix tree.
        layout: Of this tree; says which rows predict scored tokens.
        owners: Per sequence, the micro-batch that it belongs to. Chunks do not mix owners.
        max_tokens: Most tokens of a chunk; None for one chunk per depth and owner. One that holds a single one of the
            `spans`, which are never cut, may be longer.
        scored: Per sequence, one flag per token; given where prompts are to have chunks of their own.
        spans: As in `kvpref.prefix.levels.build_layout`.
        images: As there.

    Raises:
        ValueError: If a span does not stand inside one segment.
    """
    runs = segment_runs(tree, spans)
    owner_of = _segment_owners(tree, owners)
    prompts = set() if scored is None else prompt_segments(tree, scored)
    slab_of = [SlabKey(owner_of[i], segment.depth, i in prompts) for i, segment in enumerate(tree.segments)]
    limit = tree.num_unique_tokens if max_tokens is None else max_tokens
    pieces = [list(cut(len(segment), limit, own)) for segment, own in zip(tree.segments, runs, strict=True)]
    is_kept = [len(several) > 1 for several in pieces]  # earlier pieces are read by later ones
    for segment in tree.segments:
        if segment.parent is not None:
            is_kept[segment.parent] = True
    rows, slab_rows = _slab_rows(tree, slab_of, is_kept)
    contents = _Contents(tree, layout, owners, runs, images)
    places = StatePlaces(tree, slab_of)
    chunks: dict[int, list[Chunk]] = {}
    for key, kept, parts in _runs(pieces, slab_of, is_kept, limit):
        reads = slab_reads(tree, parts, slab_of, rows)
        first = rows[parts[0].segment] + parts[0].start if kept else None
        chunk = _chunk(contents, parts, (key, first), reads, places.chunk(parts))
        chunks.setdefault(key.owner, []).append(chunk)
    return ChunkLayout(
        chunks={owner: tuple(runs) for owner, runs in chunks.items()},
        slab_rows=slab_rows,
        slab_states=places.num_states,
    )


def _segment_owners(tree: PrefixTree, owners: AbstractSequence[int]) -> list[int]:
    found: list[set[int]] = [set() for _ in tree.segments]
    for path, owner in zip(tree.paths, owners, strict=True):
        for index in path:
            found[index].add(owner)
    return [next(iter(several)) if len(several) == 1 else SHARED for several in found]


def _slab_rows(
    tree: PrefixTree, slab_of: list[SlabKey], is_kept: list[bool]
) -> tuple[dict[int, int], dict[SlabKey, int]]:
    """First row of every kept segment in its slab, and the rows of the slabs."""
    rows: dict[int, int] = {}
    sizes: dict[SlabKey, int] = defaultdict(int)
    for index, segment in enumerate(tree.segments):
        if is_kept[index]:
            rows[index] = sizes[slab_of[index]]
            sizes[slab_of[index]] += len(segment)
    return rows, dict(sizes)


def _runs(
    pieces: list[list[tuple[int, int]]], slab_of: list[SlabKey], is_kept: list[bool], limit: int
) -> Iterator[tuple[SlabKey, bool, list[Span]]]:
    """The spans of each chunk, in an order in which chunks can run: whatever is read is computed before."""
    classes: dict[tuple[SlabKey, bool], list[int]] = defaultdict(list)
    for index in range(len(pieces)):
        classes[slab_of[index], is_kept[index]].append(index)
    for key, kept in sorted(classes, key=lambda item: (item[0], not item[1])):
        parts = (Span(index, start, stop) for index in classes[key, kept] for start, stop in pieces[index])
        for spans in _fill(parts, limit):
            yield key, kept, spans


def _fill(pieces: Iterable[Span], limit: int) -> Iterator[list[Span]]:
    """Fill chunks with pieces of segments in depth-first order."""
    spans: list[Span] = []
    num_tokens = 0
    for piece in pieces:
        length = piece.stop - piece.start
        if spans and num_tokens + length > limit:
            yield spans
            spans, num_tokens = [], 0
        spans.append(piece)
        num_tokens += length
    yield spans


class _Predictor(NamedTuple):
    """The row at `offset` of a segment predicts `target`; its log-prob is number `logp_index` of the U."""

    offset: int
    target: int
    logp_index: int


def _predictors(layout: LevelLayout) -> dict[int, list[_Predictor]]:
    """Per segment, its predictor rows in order."""
    found: dict[int, list[_Predictor]] = defaultdict(list)
    position = 0
    for level in layout.levels:
        starts = level.self_block.cu_seqlens_q
        for row, target in zip(level.predictor_rows, level.targets, strict=True):
            place = bisect_right(starts, row) - 1
            found[level.segments[place]].append(_Predictor(row - starts[place], target, position))
            position += 1
    return found


class _Contents:
    """What the segments of a tree hold, besides their tokens.

    Attributes:
        tree: The tree.
        predictors: Per segment, its predictor rows in order.
        owners: Per segment, how many sequences of each owner hold it.
        holders: Per segment, a sequence that holds it.
        runs: Per segment, the runs of its tokens that may see one another in both directions.
        rows: Per segment, the rows that stand for images.
    """

    def __init__(
        self,
        tree: PrefixTree,
        layout: LevelLayout,
        owners: AbstractSequence[int],
        runs: AbstractSequence[Runs],
        images: AbstractSequence[AbstractSequence[FeatureRun]],
    ) -> None:
        self.tree, self.predictors, self.owners = tree, _predictors(layout), count_holders(tree, owners)
        self.holders, self.runs = tree.holders(), runs
        self.rows = feature_rows(tree, self.holders, images)


def _chunk(
    contents: _Contents,
    spans: list[Span],
    place: tuple[SlabKey, int | None],
    reads: tuple[SlabRead, ...],
    states: ChunkStates,
) -> Chunk:
    offsets = tuple(accumulate((span.stop - span.start for span in spans), initial=0))
    rows: list[tuple[int, _Predictor]] = []
    images: list[tuple[int, int]] = []
    for first, span in zip(offsets, spans, strict=False):
        inside = (item for item in contents.predictors.get(span.segment, ()) if span.start <= item.offset < span.stop)
        rows.extend((first + item.offset - span.start, item) for item in inside)
        seen = (item for item in contents.rows.get(span.segment, ()) if span.start <= item[0] < span.stop)
        images.extend((first + offset - span.start, row) for offset, row in seen)
    segments = [contents.tree.segments[span.segment] for span in spans]
    return Chunk(
        slab=place[0],
        slab_start=place[1],
        input_ids=tuple(
            token
            for segment, span in zip(segments, spans, strict=True)
            for token in segment.input_ids[span.start : span.stop]
        ),
        position_ids=tuple(
            segment.start + offset
            for segment, span in zip(segments, spans, strict=True)
            for offset in range(span.start, span.stop)
        ),
        self_block=VarlenLayout(cu_seqlens_q=offsets, cu_seqlens_k=offsets, shape="causal"),
        reads=reads,
        predictor_rows=tuple(row for row, _ in rows),
        targets=tuple(item.target for _, item in rows),
        logp_index=tuple(item.logp_index for _, item in rows),
        occurrences=occurrences_of(contents.owners, ((span.segment, span.stop - span.start) for span in spans)),
        states=states,
        spans=runs_in_rows(spans, contents.runs),
        image_rows=tuple(row for row, _ in images),
        image_index=tuple(index for _, index in images),
        holders=tuple(contents.holders[span.segment] for span in spans),
    )
