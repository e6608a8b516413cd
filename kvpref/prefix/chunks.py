"""Chunks: a prefix tree cut into forward passes of bounded size.

While `kvpref.prefix.levels` runs all segments of one depth in one pass, a chunk runs some of them, up to a limit of
tokens, and a segment longer than that is cut into pieces that run one after another. Keys and values of segments that
are read later stand in slabs. All integers. Shape legend: T tokens of a chunk, P its predictor rows, U unique
scored tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import numpy as np

from kvpref.prefix.blocks import PlacedBlocks, VarlenLayout, offsets
from kvpref.prefix.both_ways import cut, runs_in_rows, segment_runs
from kvpref.prefix.images import FeatureRun, feature_rows
from kvpref.prefix.levels import LevelLayout, first_rows, prompt_segments
from kvpref.prefix.occurrences import Holders, Occurrences, count_holders, occurrences_of
from kvpref.prefix.predictors import Flags
from kvpref.prefix.radix import IntArray
from kvpref.prefix.runs import Runs
from kvpref.prefix.segments import NO_STATES, ChunkStates, StatePlaces
from kvpref.prefix.slab_reads import SHARED, SlabKey, SlabRead, SlabReader
from kvpref.prefix.tree import PrefixTree, Span, ranges


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Segments of one depth, or pieces of them, that run in one forward pass.

    Attributes:
        slab: The slab for its keys and values if they are kept; also says how deep it is.
        slab_start: First of its T rows there; None if its keys and values are not read later.
        input_ids: (T,) int64, token ids.
        position_ids: (T,) int64, positions inside the sequences.
        self_block: Each span over itself, causal.
        reads: One per slab that holds ancestors, or earlier pieces, of its spans.
        predictor_rows: (P,) int64, rows whose hidden state predicts a scored token.
        targets: (P,) int64, the token ids they predict.
        logp_index: (P,) int64, the place of their log-probs among the U of the whole layout.
        occurrences: How often its rows occur in the sequences; None if not counted.
        states: The states its spans start from and leave in layers that carry a state from token to token.
        spans: Runs of its rows that may see one another in both directions; see `PlacedBlocks`.
        image_rows: (M,) rows that stand for images.
        image_index: (M,) the rows of the table of features that stand there.
        holders: Per span, a sequence that holds it.
    """

    slab: SlabKey
    slab_start: int | None
    input_ids: IntArray
    position_ids: IntArray
    self_block: VarlenLayout
    reads: tuple[SlabRead, ...]
    predictor_rows: IntArray
    targets: IntArray
    logp_index: IntArray
    occurrences: Occurrences | None
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
        starts = list(self.self_block.cu_seqlens_q[:-1])
        return PlacedBlocks(
            self_block=self.self_block,
            cross_blocks=tuple(block for read in self.reads for block in read.blocks),
            query_positions=tuple(self.position_ids[starts].tolist()),
            key_positions=tuple(positions for read in self.reads for positions in read.key_positions),
            spans=self.spans,
        )


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """All chunks of a tree.

    Attributes:
        chunks: Owner -> its chunks in an order in which they can run: `SHARED` first, then owner after owner.
        slab_rows: Number of rows of each slab.
        slab_states: Number of states of each slab.
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
    scored: AbstractSequence[AbstractSequence[bool] | Flags] | None = None,
    spans: AbstractSequence[Runs] | None = None,
    images: AbstractSequence[AbstractSequence[FeatureRun]] = (),
    counts_occurrences: bool = True,
) -> ChunkLayout:
    """Cut a tree into chunks.

    Args:
        tree: The prefix tree.
        layout: The level layout of this tree; says which rows predict scored tokens.
        owners: Per sequence, the micro-batch that it belongs to. Chunks do not mix owners.
        max_tokens: Most tokens of a chunk; None for one chunk per depth and owner. One that holds a single one of the
            `spans`, which are never cut, may be longer.
        scored: Per sequence, one flag per token; given where prompts are to have chunks of their own.
        spans: As for `kvpref.prefix.levels.build_layout`.
        images: As for `kvpref.prefix.levels.build_layout`.
        counts_occurrences: Whether chunks say how often their rows occur.

    Raises:
        ValueError: If a span does not stand inside one segment.
    """
    runs = segment_runs(tree, spans)
    owner_of = _segment_owners(tree, owners)
    prompts = set() if scored is None else prompt_segments(tree, scored)
    slab_of = [SlabKey(owner_of[i], depth, i in prompts) for i, depth in enumerate(tree.depths.tolist())]
    limit = tree.num_unique_tokens if max_tokens is None else max_tokens
    pieces = [list(cut(length, limit, own)) for length, own in zip(tree.lengths.tolist(), runs, strict=True)]
    # Earlier pieces are read by later ones.
    is_kept = [has or len(several) > 1 for has, several in zip(tree.has_children.tolist(), pieces, strict=True)]
    rows, slab_rows = _slab_rows(tree, slab_of, is_kept)
    contents = _Contents(tree, layout, runs, images, count_holders(tree, owners) if counts_occurrences else None)
    places, reader = StatePlaces(tree, slab_of), SlabReader(tree, slab_of, rows)
    chunks: dict[int, list[Chunk]] = {}
    for key, kept, parts in _runs(pieces, slab_of, is_kept, limit):
        reads = reader.reads(parts)
        first = rows[parts[0].segment] + parts[0].start if kept else None
        states = NO_STATES if tree.branches_inside else places.chunk(parts)
        chunk = _chunk(contents, parts, (key, first), reads, states)
        chunks.setdefault(key.owner, []).append(chunk)
    return ChunkLayout(
        chunks={owner: tuple(runs) for owner, runs in chunks.items()},
        slab_rows=slab_rows,
        slab_states=places.num_states,
    )


def _segment_owners(tree: PrefixTree, owners: AbstractSequence[int]) -> list[int]:
    of_steps = np.array(owners)[tree.path_sequences]
    least = np.full(tree.num_segments, np.iinfo(np.int64).max)
    most = np.full(tree.num_segments, -1)
    np.minimum.at(least, tree.path_segments, of_steps)
    np.maximum.at(most, tree.path_segments, of_steps)
    return np.where(least == most, least, SHARED).tolist()  # type: ignore[no-any-return]


def _slab_rows(
    tree: PrefixTree, slab_of: list[SlabKey], is_kept: list[bool]
) -> tuple[dict[int, int], dict[SlabKey, int]]:
    """First row of every kept segment in its slab, and the number of rows of each slab."""
    rows: dict[int, int] = {}
    sizes: dict[SlabKey, int] = defaultdict(int)
    for index, length in enumerate(tree.lengths.tolist()):
        if is_kept[index]:
            rows[index] = sizes[slab_of[index]]
            sizes[slab_of[index]] += length
    return rows, dict(sizes)


def _runs(
    pieces: list[list[tuple[int, int]]], slab_of: list[SlabKey], is_kept: list[bool], limit: int
) -> Iterator[tuple[SlabKey, bool, list[Span]]]:
    """The spans of each chunk, in an order in which chunks can run: whatever is read has been computed."""
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


class _Contents:
    """What the segments of a tree hold besides tokens.

    Attributes:
        tree: The tree.
        holders: Per segment, a sequence that holds it.
        runs: Per segment, the runs of its tokens that may see one another in both directions.
        owners: Per segment, the sequences of each owner that hold it; None if not needed.
    """

    def __init__(
        self,
        tree: PrefixTree,
        layout: LevelLayout,
        runs: AbstractSequence[Runs],
        images: AbstractSequence[AbstractSequence[FeatureRun]],
        owners: list[Holders] | None,
    ) -> None:
        self.tree, self.owners = tree, owners
        self.holders, self.runs = tree.sources.tolist(), runs
        self._image_rows = feature_rows(tree, images)
        self._first_rows = first_rows(tree)
        self._depths = tree.depths.tolist()
        self._levels = layout.levels
        self._first_index = offsets(len(level.targets) for level in layout.levels)

    def predictors(self, segments: IntArray, starts: IntArray, rows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """The predictor rows of pieces of segments of one depth, their targets, and where their log-probs go.

        Args:
            segments: (n,) of each piece.
            starts: (n,) its first token there.
            rows: (n + 1,) where the pieces begin in the chunk, and where the last one ends.
        """
        depth = self._depths[segments[0]]
        level = self._levels[depth]
        in_level = self._first_rows[segments] + starts
        first, stop = np.searchsorted(level.predictor_rows, (in_level, in_level + np.diff(rows)))
        found = ranges(first, stop - first)
        shifts = np.repeat(rows[:-1] - in_level, stop - first)
        return level.predictor_rows[found] + shifts, level.targets[found], self._first_index[depth] + found

    def images(self, spans: list[Span], rows: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rows of pieces of segments that stand for images, and the rows of the table that stand there."""
        if not self._image_rows:
            return (), ()
        found: list[tuple[int, int]] = []
        for first, span in zip(rows, spans, strict=False):
            inside = (item for item in self._image_rows.get(span.segment, ()) if span.start <= item[0] < span.stop)
            found.extend((first + offset - span.start, row) for offset, row in inside)
        return tuple(row for row, _ in found), tuple(row for _, row in found)


def _chunk(
    contents: _Contents,
    spans: list[Span],
    place: tuple[SlabKey, int | None],
    reads: tuple[SlabRead, ...],
    states: ChunkStates,
) -> Chunk:
    starts = offsets(span.stop - span.start for span in spans)
    segments, firsts, _ = np.array(spans).T
    rows = np.array(starts)
    predictor_rows, targets, index = contents.predictors(segments, firsts, rows)
    image_rows, image_index = contents.images(spans, starts)
    return Chunk(
        slab=place[0],
        slab_start=place[1],
        input_ids=np.concatenate([contents.tree.tokens(*span) for span in spans]),
        position_ids=ranges(contents.tree.starts[segments] + firsts, np.diff(rows)),
        self_block=VarlenLayout(cu_seqlens_q=starts, cu_seqlens_k=starts, shape="causal"),
        reads=reads,
        predictor_rows=predictor_rows,
        targets=targets,
        logp_index=index,
        occurrences=None if contents.owners is None else occurrences_of(contents.owners, spans),
        states=states,
        spans=runs_in_rows(spans, contents.runs),
        image_rows=image_rows,
        image_index=image_index,
        holders=tuple(contents.holders[span.segment] for span in spans),
    )
