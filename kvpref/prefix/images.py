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
"""The image tokens of one segment, in order: (offset of the token, row of the table that stands there)."""


def feature_rows(tree: PrefixTree, images: AbstractSequence[AbstractSequence[FeatureRun]]) -> Mapping[int, SegmentRows]:
    """For each segment that holds tokens of images, their rows in the table.

    Args:
        tree: The prefix tree, which shares no token of an image with another image's.
        images: Per sequence, its runs in order; empty where no sequence has any.
    """
    if not any(images):
        return {}
    found = {}
    places = zip(tree.sources.tolist(), tree.starts.tolist(), tree.ends.tolist(), strict=True)
    for index, (source, start, end) in enumerate(places):
        rows = tuple(_rows_inside(images[source], start, end))
        if rows:
            found[index] = rows
    return found


def _rows_inside(runs: Iterable[FeatureRun], start: int, stop: int) -> Iterable[tuple[int, int]]:
    for run in runs:
        for position in range(max(run.first, start), min(run.stop, stop)):
            yield position - start, run.row + position - run.first
