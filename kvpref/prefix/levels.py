"""Level layout: where every token of a prefix tree stands when segments of one depth run packed in one row.

Pure Python integers; `kvpref.plan.batch` turns them into tensors. Shape legend: T_d tokens at depth d, S_d segments at
depth d, P_d predictor rows at depth d.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from itertools import accumulate

from kvpref.prefix.tree import PrefixTree, cut_segments


@dataclass(frozen=True, kw_only=True)
class VarlenLayout:
    """One varlen attention block: pair i lets queries [q[i], q[i+1]) see keys [k[i], k[i+1]).

    Attributes:
        cu_seqlens_q: Row offsets of the queries, one more entry than pairs. Pairs may have no queries.
        cu_seqlens_k: Row offsets of the keys.
        causal: Query j of a pair sees its keys up to and including j (only where both ranges are the same).
    """

    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]
    causal: bool


@dataclass(frozen=True, kw_only=True)
class Level:
    """All segments of one depth, packed in one row in depth-first order.

    Attributes:
        input_ids: (T_d,) token ids.
        position_ids: (T_d,) positions inside the sequences, continuing from the parent's end.
        self_block: Each segment over itself, causal.
        cross_blocks: Per ancestor depth 0..d-1, the descendants of each segment there over that segment.
        predictor_rows: (P_d,) rows whose hidden state predicts a scored token; a row that predicts the first
            tokens of several children stands there once per distinct token.
        targets: (P_d,) the token ids they predict.
    """

    input_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    self_block: VarlenLayout
    cross_blocks: tuple[VarlenLayout, ...]
    predictor_rows: tuple[int, ...]
    targets: tuple[int, ...]


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


def build_layout(tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool]]) -> LevelLayout:
    """Lay out `tree` by levels.

    Args:
        tree: The prefix tree of the micro-batch.
        scored: Per sequence, one flag per token. A token that several sequences share is computed once when any of
            them scores it, and counts only in those that do. One flag more asks for the row of the last token, which
            predicts nothing (its target is 0).
    """
    members = _members_by_depth(tree)
    rows = _first_rows(tree, members)
    wanted = _scored_offsets(tree, scored)
    predictors, slots = _predictors(tree, rows, wanted, num_levels=len(members))
    levels = tuple(
        Level(
            input_ids=tuple(token for index in indices for token in tree.segments[index].input_ids),
            position_ids=tuple(
                position for index in indices for position in range(tree.segments[index].start, _end(tree, index))
            ),
            self_block=_self_block(tree, indices),
            cross_blocks=tuple(_cross_block(tree, members, depth, ancestor) for ancestor in range(depth)),
            predictor_rows=tuple(row for row, _ in predictors[depth]),
            targets=tuple(target for _, target in predictors[depth]),
        )
        for depth, indices in enumerate(members)
    )
    token_index, cu_seqlens = _sequence_index(tree, scored, slots)
    return LevelLayout(
        levels=levels,
        token_index=token_index,
        cu_seqlens=cu_seqlens,
        max_position=max(_end(tree, path[-1]) for path in tree.paths) - 1,
    )


def prompt_segments(tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool]]) -> set[int]:
    """Segments up to whose end none of the sequences that hold them scores a token."""
    return {index for index, first in _first_scored(tree, scored).items() if first >= _end(tree, index)}


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


def _end(tree: PrefixTree, index: int) -> int:
    return tree.segments[index].start + len(tree.segments[index])


def _offsets(lengths: AbstractSequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def _members_by_depth(tree: PrefixTree) -> list[list[int]]:
    members: list[list[int]] = [[] for _ in range(tree.num_levels)]
    for index, segment in enumerate(tree.segments):
        members[segment.depth].append(index)
    return members


def _first_rows(tree: PrefixTree, members: list[list[int]]) -> list[int]:
    """Per segment, the row of its first token inside its own level."""
    rows = [0] * len(tree.segments)
    for indices in members:
        for index, row in zip(indices, _offsets([len(tree.segments[i]) for i in indices]), strict=False):
            rows[index] = row
    return rows


def _self_block(tree: PrefixTree, indices: list[int]) -> VarlenLayout:
    offsets = _offsets([len(tree.segments[index]) for index in indices])
    return VarlenLayout(cu_seqlens_q=offsets, cu_seqlens_k=offsets, causal=True)


def _cross_block(tree: PrefixTree, members: list[list[int]], depth: int, ancestor: int) -> VarlenLayout:
    """Depth-first order makes the descendants of each segment one contiguous range of the deeper level."""
    num_queries = dict.fromkeys(members[ancestor], 0)
    for index in members[depth]:
        above = index
        while tree.segments[above].depth > ancestor:
            parent = tree.segments[above].parent
            assert parent is not None
            above = parent
        num_queries[above] += len(tree.segments[index])
    return VarlenLayout(
        cu_seqlens_q=_offsets(list(num_queries.values())),
        cu_seqlens_k=_offsets([len(tree.segments[index]) for index in members[ancestor]]),
        causal=False,
    )


def _flagged(tree: PrefixTree, path: tuple[int, ...], flags: AbstractSequence[bool]) -> Iterator[tuple[int, int]]:
    """The (segment, offset) of each flagged token of a sequence; the offset after the last asks for the end."""
    for index in path:
        start = tree.segments[index].start
        stop = len(flags) if index == path[-1] else _end(tree, index)
        yield from ((index, offset) for offset, flag in enumerate(flags[start:stop]) if flag)


def _scored_offsets(tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool]]) -> list[set[int]]:
    """Per segment, the offsets of the tokens that at least one sequence scores."""
    wanted: list[set[int]] = [set() for _ in tree.segments]
    for path, flags in zip(tree.paths, scored, strict=True):
        for index, offset in _flagged(tree, path, flags):
            wanted[index].add(offset)
    return wanted


def _predictors(
    tree: PrefixTree, rows: list[int], wanted: list[set[int]], num_levels: int
) -> tuple[list[list[tuple[int, int]]], dict[tuple[int, int], int]]:
    """Find the row that predicts each scored token.

    Returns:
        Per level the (row, target) pairs, and for every scored (segment, offset) its index in the concatenation of
        all levels' pairs.
    """
    pairs: list[list[tuple[int, int]]] = [[] for _ in range(num_levels)]
    places: dict[tuple[int, int], tuple[int, int]] = {}
    for index, segment in enumerate(tree.segments):
        for offset in sorted(wanted[index]):
            depth, row = segment.depth, rows[index] + offset - 1
            if offset == 0:
                # A segment's first token is predicted by its parent's last token, which ran in an earlier pass.
                assert segment.parent is not None, "the first token of a sequence cannot be scored"
                parent = tree.segments[segment.parent]
                depth, row = parent.depth, rows[segment.parent] + len(parent) - 1
            places[index, offset] = (depth, len(pairs[depth]))
            pairs[depth].append((row, segment.input_ids[offset] if offset < len(segment) else 0))
    bases = _offsets([len(level) for level in pairs])
    return pairs, {key: bases[depth] + slot for key, (depth, slot) in places.items()}


def _sequence_index(
    tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool]], slots: dict[tuple[int, int], int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    token_index: list[int] = []
    cu_seqlens = [0]
    for path, flags in zip(tree.paths, scored, strict=True):
        token_index.extend(slots[place] for place in _flagged(tree, path, flags))
        cu_seqlens.append(len(token_index))
    return tuple(token_index), tuple(cu_seqlens)
