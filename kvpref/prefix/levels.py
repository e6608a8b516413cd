"""Level layout: where every token of a prefix tree stands when segments of one depth run packed in one row.

Pure Python integers; `kvpref.plan.batch` turns them into tensors. Shape legend: T_d tokens at depth d, S_d segments at
depth d, P_d predictor rows at depth d, M_d rows that stand for images.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from kvpref.prefix.both_ways import Runs, runs_in_rows, segment_runs
from kvpref.prefix.images import FeatureRun, SegmentRows, feature_rows
from kvpref.prefix.predictors import find_predictors, scored_offsets, sequence_index
from kvpref.prefix.tree import PrefixTree, Span, cut_segments

Shape = Literal["rectangle", "causal", "anti_causal"]
"""What query i of a pair sees of its keys: all; those up to and including key i; those from key i on. The last two are
squares: a pair has as many queries as keys."""


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
        window: Of a causal block whose queries are its keys: query q sees key k only where q - k < window.
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
        cross_blocks: Per prefix, the segments that continue a run of its rows over that run. A segment's queries are
            in one pair.
        query_positions: Per segment, the position of its first token inside the sequences.
        key_positions: Per prefix and pair of its block, the position of the pair's first key.
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
        """T_d."""
        return self.self_block.cu_seqlens_q[-1]


@dataclass(frozen=True, kw_only=True)
class LevelSegments(PlacedBlocks):
    """All segments of one depth, packed in one row in depth-first order; one prefix per ancestor depth 0..d-1.

    Attributes:
        segments: (S_d,) their places in the tree.
    """

    segments: tuple[int, ...]

    @property
    def placed(self) -> PlacedBlocks:
        """The blocks alone."""
        return PlacedBlocks(
            self_block=self.self_block,
            cross_blocks=self.cross_blocks,
            query_positions=self.query_positions,
            key_positions=self.key_positions,
            spans=self.spans,
        )


@dataclass(frozen=True, kw_only=True)
class Level(LevelSegments):
    """With the tokens, and the rows that are read.

    Attributes:
        input_ids: (T_d,) token ids.
        position_ids: (T_d,) positions inside the sequences, continuing from the parent's end.
        predictor_rows: (P_d,) rows whose hidden state predicts a scored token; a row that predicts the first
            tokens of several children stands there once per distinct token.
        targets: (P_d,) the token ids they predict.
        image_rows: (M_d,) rows that stand for images.
        image_index: (M_d,) the rows of the table of features that stand there.
        holders: (S_d,) per segment, a sequence that holds it.
    """

    input_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    predictor_rows: tuple[int, ...]
    targets: tuple[int, ...]
    image_rows: tuple[int, ...]
    image_index: tuple[int, ...]
    holders: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LevelLayout:
    """The levels of a tree, and the way back from unique scored tokens to the caller's sequences.

    Attributes:
        levels: Depth 0 first.
        token_index: (num_scored_tokens,) index into the concatenation of all levels' `targets`, sequence after
            sequence in the caller's order.
        cu_seqlens: (num_sequences + 1,) offsets of each sequence's scored tokens in `token_index`.
        max_position: The largest position of any token.
    """

    levels: tuple[Level, ...]
    token_index: tuple[int, ...]
    cu_seqlens: tuple[int, ...]
    max_position: int


def build_levels(tree: PrefixTree, spans: AbstractSequence[Runs] | None = None) -> tuple[LevelSegments, ...]:
    """The levels of a tree, from the lengths of segments alone; `spans` as in `build_layout`."""
    runs = segment_runs(tree, spans)
    members: list[list[int]] = [[] for _ in range(tree.num_levels)]
    lines: list[tuple[int, ...]] = []  # per segment, its ancestors by depth and itself
    for index, segment in enumerate(tree.segments):
        lines.append((index,) if segment.parent is None else (*lines[segment.parent], index))
        members[segment.depth].append(index)
    lengths = list(map(len, tree.segments))
    starts = [tuple(tree.segments[index].start for index in level) for level in members]

    def cross_block(depth: int, ancestor: int) -> VarlenLayout:
        """Depth-first order makes the descendants of each segment one contiguous range of the deeper level."""
        num_queries = dict.fromkeys(members[ancestor], 0)
        for index in members[depth]:
            num_queries[lines[index][ancestor]] += lengths[index]
        keys = _offsets([lengths[index] for index in members[ancestor]])
        queries = _offsets(list(num_queries.values()))
        return VarlenLayout(cu_seqlens_q=queries, cu_seqlens_k=keys, shape="rectangle", source=ancestor + 1)

    levels = []
    for depth, segments in enumerate(members):
        own = _offsets([lengths[index] for index in segments])
        levels.append(
            LevelSegments(
                segments=tuple(segments),
                self_block=VarlenLayout(cu_seqlens_q=own, cu_seqlens_k=own, shape="causal"),
                cross_blocks=tuple(cross_block(depth, ancestor) for ancestor in range(depth)),
                query_positions=starts[depth],
                key_positions=tuple(starts[:depth]),  # one pair per ancestor
                spans=runs_in_rows([Span(index, 0, lengths[index]) for index in segments], runs),
            )
        )
    return tuple(levels)


def build_layout(
    tree: PrefixTree,
    scored: AbstractSequence[AbstractSequence[bool]],
    spans: AbstractSequence[Runs] | None = None,
    images: AbstractSequence[AbstractSequence[FeatureRun]] = (),
) -> LevelLayout:
    """Lay out `tree` by levels, with the rows that predict scored tokens.

    Args:
        tree: The prefix tree of the micro-batch.
        scored: Per sequence, one flag per token. A token that several sequences share is computed once when any of
            them scores it, and counts only in those that do. One flag more asks for the row of the last token, which
            predicts nothing (its target is 0).
        spans: Per sequence the runs of its tokens that may see one another in both directions, as positions
            [first, stop); None for none.
        images: Per sequence, where features of images stand; empty where there are none.

    Raises:
        ValueError: If a run does not stand inside one segment.
    """
    bare = build_levels(tree, spans)
    holders = tree.holders()
    rows_of = feature_rows(tree, holders, images)
    predictors, slots = find_predictors(tree, first_rows(bare), scored_offsets(tree, scored), num_levels=len(bare))
    token_index, cu_seqlens = sequence_index(tree, scored, slots)
    return LevelLayout(
        levels=tuple(
            _with_tokens(tree, level, pairs, holders, rows_of) for level, pairs in zip(bare, predictors, strict=True)
        ),
        token_index=token_index,
        cu_seqlens=cu_seqlens,
        max_position=max(tree.end(path[-1]) for path in tree.paths) - 1,
    )


def _with_tokens(
    tree: PrefixTree,
    level: LevelSegments,
    predictors: list[tuple[int, int]],
    holders: tuple[int, ...],
    rows_of: Mapping[int, SegmentRows],
) -> Level:
    segments = [tree.segments[index] for index in level.segments]
    starts = level.self_block.cu_seqlens_q
    images = [
        (start + offset, row)
        for index, start in zip(level.segments, starts, strict=False)  # and the end
        for offset, row in rows_of.get(index, ())
    ]
    return Level(
        **vars(level),
        input_ids=tuple(token for segment in segments for token in segment.input_ids),
        position_ids=tuple(
            position for segment in segments for position in range(segment.start, segment.start + len(segment))
        ),
        predictor_rows=tuple(row for row, _ in predictors),
        targets=tuple(target for _, target in predictors),
        image_rows=tuple(row for row, _ in images),
        image_index=tuple(index for _, index in images),
        holders=tuple(holders[index] for index in level.segments),
    )


def first_rows(levels: AbstractSequence[LevelSegments]) -> dict[int, int]:
    """Per segment, the row of its first token inside its own level."""
    return {
        index: row
        for level in levels
        for index, row in zip(level.segments, level.self_block.cu_seqlens_q, strict=False)  # and the end
    }


def prompt_segments(tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool]]) -> set[int]:
    """Segments up to whose end none of the sequences that hold them scores a token."""
    return {index for index, first in _first_scored(tree, scored).items() if first >= tree.end(index)}


def cut_prompts(tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool]]) -> PrefixTree:
    """The same sequences, where no segment holds the end of a prompt and the beginning of a response."""
    ends = {index: first - tree.segments[index].start for index, first in _first_scored(tree, scored).items()}
    return cut_segments(tree, {index: end for index, end in ends.items() if 0 < end < len(tree.segments[index])})


def _first_scored(tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool]]) -> dict[int, int]:
    """Per segment, the position of the first token that one of its sequences scores, there or elsewhere."""
    found: dict[int, int] = {}
    for path, flags in zip(tree.paths, scored, strict=True):
        first = flags.index(True) if True in flags else len(flags)
        for index in path:
            found[index] = min(first, found.get(index, first))
    return found


def _offsets(lengths: AbstractSequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))
