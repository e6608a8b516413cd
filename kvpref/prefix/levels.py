"""Level layout: where every token of a prefix tree stands when segments of one depth run packed in one row.

Integers in numpy arrays; `kvpref.plan.batch` turns them into tensors. Shape legend: T_d tokens at depth d, S_d segments
at depth d, P_d predictor rows at depth d, M_d rows that stand for images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import numpy as np

from kvpref.prefix.blocks import Pair, PlacedBlocks, VarlenLayout, block_pairs, nested_blocks, offsets
from kvpref.prefix.both_ways import runs_in_rows, segment_runs
from kvpref.prefix.building import cut_segments
from kvpref.prefix.images import FeatureRun, SegmentRows, feature_rows
from kvpref.prefix.predictors import Flags, find_predictors
from kvpref.prefix.radix import IntArray
from kvpref.prefix.runs import Runs
from kvpref.prefix.tree import PrefixTree, Span


@dataclass(frozen=True, kw_only=True)
class LevelSegments(PlacedBlocks):
    """All segments of one depth, packed in one row in depth-first order; prefix i - 1 is the level of depth i - 1.

    Attributes:
        segments: (S_d,) int64, their indices in the tree.
    """

    segments: tuple[int, ...]

    @property
    def placed(self) -> PlacedBlocks:
        """Only the blocks."""
        return PlacedBlocks(
            self_block=self.self_block,
            cross_blocks=self.cross_blocks,
            query_positions=self.query_positions,
            key_positions=self.key_positions,
            spans=self.spans,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Level(LevelSegments):
    """A level with its tokens and the rows that are read.

    Attributes:
        input_ids: (T_d,) int64, token ids.
        position_ids: (T_d,) int64, positions inside the sequences, continuing from where they branch off the parent.
        predictor_rows: (P_d,) int64 in order, rows whose hidden state predicts a scored token; a row that predicts
            several tokens, where sequences part, occurs once per distinct token.
        targets: (P_d,) int64, the token ids they predict.
        image_rows: (M_d,) rows that stand for images.
        image_index: (M_d,) the rows of the table of features that stand there.
        holders: (S_d,) per segment, a sequence that holds it.
    """

    input_ids: IntArray
    position_ids: IntArray
    predictor_rows: IntArray
    targets: IntArray
    image_rows: tuple[int, ...]
    image_index: tuple[int, ...]
    holders: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelLayout:
    """The levels of a tree, and the way back from unique scored tokens to the caller's sequences.

    Attributes:
        levels: Depth 0 first.
        token_index: (num_scored_tokens,) int64, index into the concatenation of all levels' `targets`, sequence after
            sequence in the caller's order.
        cu_seqlens: (num_sequences + 1,) int64, offsets of each sequence's scored tokens in `token_index`.
        max_position: The largest position of any token.
    """

    levels: tuple[Level, ...]
    token_index: IntArray
    cu_seqlens: IntArray
    max_position: int


def build_levels(tree: PrefixTree, spans: AbstractSequence[Runs] | None = None) -> tuple[LevelSegments, ...]:
    """The levels of a tree, from the lengths of segments alone; `spans` as for `build_layout`."""
    runs = segment_runs(tree, spans)
    members = [np.flatnonzero(tree.depths == depth) for depth in range(tree.num_levels)]
    rows = first_rows(tree)
    levels: list[LevelSegments] = []
    for segments in members:
        own = offsets(tree.lengths[segments].tolist())
        cross = list(_cross_blocks(tree, segments, rows, levels))
        levels.append(
            LevelSegments(
                segments=tuple(segments.tolist()),
                self_block=VarlenLayout(cu_seqlens_q=own, cu_seqlens_k=own, shape="causal"),
                cross_blocks=tuple(cross),
                query_positions=tuple(tree.starts[segments].tolist()),
                key_positions=tuple(_key_positions(tree, levels[block.source - 1], block) for block in cross),
                spans=_runs_of_level(segments.tolist(), tree, runs) if spans else (),
            )
        )
    return tuple(levels)


def _runs_of_level(segments: list[int], tree: PrefixTree, runs: list[Runs]) -> Runs:
    return runs_in_rows([Span(index, 0, int(tree.lengths[index])) for index in segments], runs)


def _cross_blocks(
    tree: PrefixTree, segments: IntArray, rows: IntArray, levels: AbstractSequence[LevelSegments]
) -> Iterator[VarlenLayout]:
    """What a level's segments see of each level above; in depth-first order, those that see the same are neighbours."""
    ends = np.cumsum(tree.lengths[segments])
    for depth, reached in enumerate(_ancestors(tree, segments)):
        above, num_seen = reached
        is_last = np.append((above[1:] != above[:-1]) | (num_seen[1:] != num_seen[:-1]), True)
        stops = ends[is_last]
        columns = (np.append(0, stops[:-1]), np.diff(stops, prepend=0), rows[above[is_last]], num_seen[is_last])
        pairs = itertools.starmap(Pair, zip(*(column.tolist() for column in columns), strict=True))
        yield from nested_blocks(pairs, (int(ends[-1]), levels[depth].num_rows), source=depth + 1)


def _ancestors(tree: PrefixTree, segments: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Per level above, the segments' ancestors there, and how many of their tokens they see."""
    found = []
    below = segments
    for _ in range(int(tree.depths[segments[0]])):
        above = tree.parents[below]
        found.append((above, tree.starts[below] - tree.starts[above]))
        below = above
    return found[::-1]


def _key_positions(tree: PrefixTree, level: LevelSegments, block: VarlenLayout) -> tuple[int, ...]:
    firsts = np.array(level.self_block.cu_seqlens_q)
    keys = [(num_keys, first) for _, num_keys, first in block_pairs(block)]
    is_seen = np.array([num_keys > 0 for num_keys, _ in keys])
    starts = np.array([first for _, first in keys])
    places = np.searchsorted(firsts, starts, side="right") - 1
    places = np.minimum(places, len(level.segments) - 1)
    positions = np.array(level.query_positions)[places] + starts - firsts[places]
    return tuple(np.where(is_seen, positions, 0).tolist())


def build_layout(
    tree: PrefixTree,
    scored: AbstractSequence[AbstractSequence[bool] | Flags],
    spans: AbstractSequence[Runs] | None = None,
    images: AbstractSequence[AbstractSequence[FeatureRun]] = (),
) -> LevelLayout:
    """Lay out `tree` by levels, with the rows that predict scored tokens.

    Args:
        tree: The prefix tree of the micro-batch.
        scored: Per sequence, one flag per token. A token shared by several sequences is computed once if any of
            them scores it, and counts only in those that do. One extra flag asks for the row of the last token, which
            predicts nothing.
        spans: Per sequence the runs of its tokens that may see one another in both directions, as positions
            [first, stop); None if there are none.
        images: Per sequence, where features of images stand; empty where there are none.

    Raises:
        ValueError: If a run does not stand inside one segment.
    """
    bare = build_levels(tree, spans)
    rows_of = feature_rows(tree, images)
    order = np.concatenate([level.segments for level in bare]).astype(np.int64)
    tokens = tree.tokens_of(order)
    predictors = find_predictors(tree, order, tokens, [np.asarray(flags, dtype=bool) for flags in scored])
    own_tokens = np.split(tokens, np.cumsum([level.num_rows for level in bare])[:-1])
    images_of = [_image_rows(level, rows_of) for level in bare]
    parts = zip(bare, own_tokens, predictors.rows, predictors.targets, images_of, strict=True)
    return LevelLayout(
        levels=tuple(
            Level(
                **vars(level),
                input_ids=input_ids,
                position_ids=tree.positions_of(np.array(level.segments)),
                predictor_rows=rows,
                targets=targets,
                holders=tuple(tree.sources[list(level.segments)].tolist()),
                image_rows=tuple(row for row, _ in images),
                image_index=tuple(index for _, index in images),
            )
            for level, input_ids, rows, targets, images in parts
        ),
        token_index=predictors.token_index,
        cu_seqlens=predictors.cu_seqlens,
        max_position=max(map(len, tree.sequences)) - 1,
    )


def _image_rows(level: LevelSegments, rows_of: Mapping[int, SegmentRows]) -> list[tuple[int, int]]:
    """Rows of the level that stand for images, each with its row of the table."""
    starts = level.self_block.cu_seqlens_q
    return [
        (start + offset, row)
        for index, start in zip(level.segments, starts, strict=False)  # and the end
        for offset, row in rows_of.get(index, ())
    ]


def first_rows(tree: PrefixTree) -> IntArray:
    """(S,) int64, per segment the row of its first token inside its own level."""
    order = np.argsort(tree.depths, kind="stable")
    rows = np.cumsum(tree.lengths[order]) - tree.lengths[order]
    level_rows = np.bincount(tree.depths, weights=tree.lengths).astype(np.int64)
    found = np.empty_like(rows)
    found[order] = rows
    return found - (np.cumsum(level_rows) - level_rows)[tree.depths]


def prompt_segments(tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool] | Flags]) -> set[int]:
    """Segments with no scored token up to their end, in any sequence that holds them."""
    return set(np.flatnonzero(_first_scored(tree, scored) >= tree.ends).tolist())


def cut_prompts(tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool] | Flags]) -> PrefixTree:
    """The same sequences, cut so that no segment mixes tokens of prompts with others.

    A token belongs to a prompt if no sequence that holds it scores it or an earlier token.
    """
    firsts = _firsts(scored)[tree.path_sequences]
    of_segment: list[list[tuple[int, int]]] = [[] for _ in range(tree.num_segments)]
    for segment, stop, first in zip(
        tree.path_segments.tolist(), tree.path_stops.tolist(), firsts.tolist(), strict=True
    ):
        of_segment[segment].append((stop, first))
    cuts = {}
    for index, (start, own) in enumerate(zip(tree.starts.tolist(), of_segment, strict=True)):
        if places := [place - start for place in _prompt_ends(start, own)]:
            cuts[index] = places
    return cut_segments(tree, cuts)


def _prompt_ends(start: int, steps: list[tuple[int, int]]) -> list[int]:
    """Where a segment changes from prompts to other tokens or back.

    Args:
        start: Its first position.
        steps: For each sequence that holds it: where the sequence leaves it, and the first token that it scores.
    """
    ordered = sorted(steps)
    firsts = [first for _, first in reversed(ordered)]
    found, place, was_prompt = [], start, None
    # For each, the first token scored by sequences that go as far or further.
    for (stop, _), first in zip(ordered, reversed(list(itertools.accumulate(firsts, min))), strict=True):
        for position in sorted({place, min(max(first, place), stop)} - {stop}):
            is_prompt = position < first
            if was_prompt not in (None, is_prompt):
                found.append(position)
            was_prompt = is_prompt
        place = stop
    return found


def _first_scored(tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool] | Flags]) -> IntArray:
    """(S,) int64, per segment the position of the first token scored by any of its sequences, there or before."""
    firsts = _firsts(scored)[tree.path_sequences]
    never = np.iinfo(np.int64).max
    found = np.full(tree.num_segments, never)
    np.minimum.at(found, tree.path_segments, np.where(firsts < tree.path_stops, firsts, never))
    return found


def _firsts(scored: AbstractSequence[AbstractSequence[bool] | Flags]) -> IntArray:
    """(N,) int64, the first token that each sequence scores; its length where it scores none."""
    arrays = [np.asarray(flags, dtype=bool) for flags in scored]
    return np.array([flags.argmax() if flags.any() else len(flags) for flags in arrays])
