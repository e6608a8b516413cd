"""Runs of tokens that see one another in both directions: where they stand in segments, and in pieces of them.

A model may let the tokens of an image, or of a whole prompt, see later ones of the same run. Such a run stands inside
one segment, because what its first token becomes depends on its last. Pure Python integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as AbstractSequence

from kvpref.prefix.runs import Runs
from kvpref.prefix.tree import PrefixTree, Span


def segment_runs(tree: PrefixTree, spans: AbstractSequence[Runs] | None) -> list[Runs]:
    """Per segment the runs that stand in it, as offsets from its first token.

    Args:
        tree: The prefix tree.
        spans: Per sequence its runs, as positions inside it; None if there are none.

    Raises:
        ValueError: If a run does not stand inside one segment, or sequences that share a segment differ in its runs.
    """
    if not spans or not any(spans):
        return [()] * tree.num_segments
    found = [
        _runs_inside(spans[source], start, end)
        for source, start, end in zip(tree.sources.tolist(), tree.starts.tolist(), tree.ends.tolist(), strict=True)
    ]
    for number, runs in enumerate(spans):
        num_placed = 0
        for index, start, stop in tree.steps(number):
            own = _runs_inside(runs, start, stop)
            num_placed += len(own)
            known = tuple(run for run in found[index] if run[1] <= stop - start)
            if known != own:
                raise ValueError(f"segment {index} has the runs {known} in one sequence and {own} in another")
        if num_placed != len(runs):
            raise ValueError(f"tokens that see one another in both directions must stand in one segment; got {runs}")
    return found


def _runs_inside(runs: Runs, start: int, stop: int) -> Runs:
    """The runs inside [start, stop), counted from `start`."""
    return tuple((first - start, end - start) for first, end in runs if start <= first and end <= stop)


def runs_in_rows(pieces: Iterable[Span], runs: AbstractSequence[Runs]) -> Runs:
    """The runs, as rows, in pieces of segments that stand one after another.

    Args:
        pieces: Pieces of segments; none of them cuts a run.
        runs: The runs of each segment, from `segment_runs`.
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
    """Cut a segment into pieces of at most `limit` tokens; a piece is longer only where a single run is.

    Args:
        length: Tokens of the segment.
        limit: Most tokens of a piece, at least 1.
        runs: The segment's runs, none of which is cut.
    """
    start = 0
    while start < length:
        stop = min(start + limit, length)
        first, end = next(((a, b) for a, b in runs if a < stop < b), (stop, stop))
        stop = first if first > start else end
        yield start, stop
        start = stop
