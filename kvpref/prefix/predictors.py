"""Which rows of a prefix tree's levels predict scored tokens, and the way from them to the sequences."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from itertools import accumulate

from kvpref.prefix.tree import PrefixTree


def _flagged(tree: PrefixTree, path: tuple[int, ...], flags: AbstractSequence[bool]) -> Iterator[tuple[int, int]]:
    """The (segment, offset) of each flagged token of a sequence; the offset after the last asks for the end."""
    for index in path:
        start = tree.segments[index].start
        stop = len(flags) if index == path[-1] else tree.end(index)
        yield from ((index, offset) for offset, flag in enumerate(flags[start:stop]) if flag)


def scored_offsets(tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool]]) -> list[set[int]]:
    """Per segment, the offsets of the tokens that at least one sequence scores."""
    wanted: list[set[int]] = [set() for _ in tree.segments]
    for path, flags in zip(tree.paths, scored, strict=True):
        for index, offset in _flagged(tree, path, flags):
            wanted[index].add(offset)
    return wanted


def find_predictors(
    tree: PrefixTree, rows: dict[int, int], wanted: list[set[int]], num_levels: int
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
    bases = tuple(accumulate((len(level) for level in pairs), initial=0))
    return pairs, {key: bases[depth] + slot for key, (depth, slot) in places.items()}


def sequence_index(
    tree: PrefixTree, scored: AbstractSequence[AbstractSequence[bool]], slots: dict[tuple[int, int], int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    token_index: list[int] = []
    cu_seqlens = [0]
    for path, flags in zip(tree.paths, scored, strict=True):
        token_index.extend(slots[place] for place in _flagged(tree, path, flags))
        cu_seqlens.append(len(token_index))
    return tuple(token_index), tuple(cu_seqlens)
