"""How often tokens that run once occur in the sequences; a mean over the sequences' tokens weights them by this."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kvpref.prefix.tree import PrefixTree, Span


@dataclass(frozen=True, kw_only=True)
class Occurrences:
    """How many sequences hold the rows of a pass, run by run.

    Attributes:
        owners: (M,) the micro-batches that hold some of the rows.
        lengths: (R,) number of rows of each run.
        counts: Per owner, (R,) how many of its sequences hold each run.
    """

    owners: tuple[int, ...]
    lengths: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]


Holders = dict[int, list[int]]
"""For a segment: owner -> the offset up to which each of its sequences holds it, shortest first."""


def count_holders(tree: PrefixTree, owners: AbstractSequence[int]) -> list[Holders]:
    """Per segment, the sequences of each owner that hold it.

    Args:
        tree: The prefix tree.
        owners: Per sequence, the micro-batch that it belongs to.
    """
    found: list[Holders] = [{} for _ in range(tree.num_segments)]
    held = tree.path_stops - tree.starts[tree.path_segments]
    columns = (tree.path_segments.tolist(), tree.path_sequences.tolist(), held.tolist())
    for segment, sequence, stop in zip(*columns, strict=True):
        found[segment].setdefault(owners[sequence], []).append(stop)
    for holders in found:
        for stops in holders.values():
            stops.sort()
    return found


def occurrences_of(holders: AbstractSequence[Holders], spans: Iterable[Span]) -> Occurrences:
    """The occurrences of pieces of segments that stand one after another."""
    spans = list(spans)
    owners = sorted({owner for span in spans for owner in holders[span.segment]})
    lengths: list[int] = []
    counts: list[list[int]] = [[] for _ in owners]
    for span in spans:
        own = holders[span.segment]
        inside: set[int] = set()
        for stops in own.values():
            inside.update(stops[bisect_right(stops, span.start) : bisect_left(stops, span.stop)])
        for start, stop in pairwise([span.start, *sorted(inside), span.stop]):
            lengths.append(stop - start)
            for owner, column in zip(owners, counts, strict=True):
                stops = own.get(owner, [])
                column.append(len(stops) - bisect_right(stops, start))
    return Occurrences(owners=tuple(owners), lengths=tuple(lengths), counts=tuple(map(tuple, counts)))


def tree_occurrences(tree: PrefixTree) -> Occurrences:
    """The occurrences of a whole tree of one micro-batch, level after level."""
    order = np.argsort(tree.depths, kind="stable").tolist()
    holders = count_holders(tree, [0] * len(tree.sequences))
    return occurrences_of(holders, (Span(index, 0, int(tree.lengths[index])) for index in order))
