"""Runs of tokens that see one another in both directions: where they stand in segments, and in pieces of them.

A model may let the tokens of an image, or of a whole prompt, see later ones of the same run. Such a run stands inside
one segment, because what its first token becomes depends on its last. Pure Python integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as AbstractSequence

from kvpref.prefix.tree import PrefixTree, Span

Runs = tuple[tuple[int, int], ...]
"""Ranges [first, stop), in order."""


def joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """The same tokens, with neighbours as one run: models find runs by looking for tokens that are no text."""
    found: list[tuple[int, int]] = []
    for first, stop in runs:
        if found and found[-1][1] == first:
            first = found.pop()[0]
        found.append((first, stop))
    return tuple(found)


def segment_runs(tree: PrefixTree, spans: AbstractSequence[Runs] | None) -> list[Runs]:
    """Per segment the runs that stand in it, as offsets from its first token.

    Args:
        tree: The prefix tree.
        spans: Per sequence its runs, as positions inside it; None for none.

    Raises:
        ValueError: If a run does not stand inside one segment, or sequences that share a segment differ in its runs.
    """
    found: list[Runs | None] = [None] * len(tree.segments)
    for path, runs in zip(tree.paths, spans or [()] * len(tree.paths), strict=True):
        num_placed = 0
        for index in path:
            start, length = tree.segments[index].start, len(tree.segments[index])
            own = tuple((a - start, b - start) for a, b in runs if start <= a and b <= start + length)
            num_placed += len(own)
            if found[index] not in (None, own):
                raise ValueError(f"segment {index} has the runs {found[index]} in one sequence and {own} in another")
            found[index] = own
        if num_placed != len(runs):
            raise ValueError(f"tokens that see one another in both directions must stand in one segment; got {runs}")
    return [own or () for own in found]


def runs_in_rows(pieces: Iterable[Span], runs: AbstractSequence[Runs]) -> Runs:
    """The row runs of pieces of segments that stand in rows one after another.

    Args:
        pieces: None of them cuts a run.
        runs: Of each segment, from `segment_runs`.
    """
    found: list[tuple[int, int]] = []
    row = 0
    for piece in pieces:
        shift = row - piece.start
        inside = (run for run in runs[piece.segment] if piece.start <= run[0] and run[1] <= piece.stop)
        found.extend((first + shift, stop + shift) for first, stop in inside)
        row += piece.stop - piece.start
    return tuple(found)


def cut(length: int, limit: int, runs: Runs) -> Iterator[tuple[int, int]]:
    """Cut a segment into pieces of at most `limit` tokens, longer only where one run is.

    Args:
        length: Tokens of the segment.
        limit: At least 1.
        runs: Of the segment; none is cut.
    """
    start = 0
    while start < length:
        stop = min(start + limit, length)
        first, end = next(((a, b) for a, b in runs if a < stop < b), (stop, stop))
        stop = first if first > start else end
        yield start, stop
        start = stop
