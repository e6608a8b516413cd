"""The runs of tokens between places where sequences of a group diverge or end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kvpref.prefix.tree import PrefixTree
from kvpref.records.groups import Sequence

Runs = tuple[tuple[int, int], ...]
"""Positions [first, stop)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Tokens held by the same sequences.

    Attributes:
        parent: Index of the run before it, or None at the beginning.
        start: Position of its first token.
        stop: Position after its last token.
        holders: The sequences that hold it, ascending.
        ending: The sequences that end at `stop`.
        scored: Positions scored by at least one of them.
    """

    parent: int | None
    start: int
    stop: int
    holders: tuple[int, ...]
    ending: tuple[int, ...]
    scored: Runs

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def ends_inside(self) -> bool:
        """Whether some of its sequences end at its stop while others continue."""
        return 0 < len(self.ending) < len(self.holders)

    @property
    def num_scored(self) -> int:
        return sum(stop - first for first, stop in self.scored)


def find_runs(tree: PrefixTree, sequences: AbstractSequence[Sequence]) -> tuple[Run, ...]:
    """The runs of a tree, parents before their children.

    A segment of the tree may continue where sequences leave it or end; here it is cut there.

    Args:
        tree: The prefix tree of `sequences`.
        sequences: The sequences, in the order of the tree's paths.
    """
    uses: defaultdict[int, list[tuple[int, int]]] = defaultdict(
        list
    )  # segment -> (position where a sequence leaves it, sequence)
    for number, path in enumerate(tree.paths):
        stops = [*(tree.segments[index].start for index in path[1:]), len(sequences[number])]
        for index, stop in zip(path, stops, strict=True):
            uses[index].append((stop, number))
    runs: list[Run] = []
    places: dict[tuple[int | None, int], int] = {}  # (segment, position) -> the run that stops there
    for index, segment in enumerate(tree.segments):
        parent = places.get((segment.parent, segment.start))
        cuts = [segment.start, *sorted({stop for stop, _ in uses[index]})]
        for start, stop in pairwise(cuts):
            holders = tuple(number for last, number in uses[index] if last >= stop)
            runs.append(
                Run(
                    parent=parent,
                    start=start,
                    stop=stop,
                    holders=holders,
                    ending=tuple(number for number in holders if len(sequences[number]) == stop),
                    scored=_scored(sequences, holders, start, stop),
                )
            )
            parent = places[index, stop] = len(runs) - 1
    return tuple(runs)


def children_of(runs: AbstractSequence[Run]) -> dict[int | None, list[int]]:
    """Run -> the runs that continue it; under None, those at the beginning."""
    found: dict[int | None, list[int]] = {None: [], **{index: [] for index in range(len(runs))}}
    for index, run in enumerate(runs):
        found[run.parent].append(index)
    for several in found.values():
        several.sort(key=lambda index: runs[index].holders[0])
    return found


def _scored(sequences: AbstractSequence[Sequence], holders: AbstractSequence[int], start: int, stop: int) -> Runs:
    flags = np.zeros(stop - start, dtype=np.bool_)
    for number in holders:
        flags |= sequences[number].flags[start:stop]
    edges = start + np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
