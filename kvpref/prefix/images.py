"""Where features of images stand in a prefix tree. Pure Python integers.

The features of all images of a batch, or of a step, are the rows of one table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from typing import NamedTuple

from kvpref.prefix.tree import PrefixTree


class FeatureRun(NamedTuple):
    """Rows [row, row + stop - first) of the table stand at the positions [first, stop) of a sequence."""

    first: int
    stop: int
    row: int


SegmentRows = tuple[tuple[int, int], ...]
"""Of one segment: (offset of a token, row of the table that stands there), in order."""


def feature_rows(
    tree: PrefixTree, holders: AbstractSequence[int], images: AbstractSequence[AbstractSequence[FeatureRun]]
) -> Mapping[int, SegmentRows]:
    """Per segment that holds tokens of images, their rows in the table.

    Args:
        tree: The prefix tree, which shares no token of an image with another image's.
        holders: Per segment, a sequence that holds it.
        images: Per sequence, its runs in order; empty where no sequence has any.
    """
    if not any(images):
        return {}
    found = {}
    for index, segment in enumerate(tree.segments):
        rows = tuple(_rows_inside(images[holders[index]], segment.start, segment.start + len(segment)))
        if rows:
            found[index] = rows
    return found


def _rows_inside(runs: Iterable[FeatureRun], start: int, stop: int) -> Iterable[tuple[int, int]]:
    for run in runs:
        for position in range(max(run.first, start), min(run.stop, stop)):
            yield position - start, run.row + position - run.first
