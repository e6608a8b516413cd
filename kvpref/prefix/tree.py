"""Prefix tree: the radix tree over the token lists of one micro-batch.

Every run of tokens that several sequences share is stored once. Integers in numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from kvpref.prefix.radix import IntArray

NO_PARENT = -1
"""Parent of a segment that begins sequences."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of tokens that one or more sequences share; a node of the prefix tree.

    Attributes:
        parent: Index of the parent segment, or None at depth 0.
        depth: 0 for segments that start a sequence; a child is one deeper than its parent.
        start: Position, inside every sequence that holds it, of the segment's first token. It sees its parent's tokens
            before that position, which is the parent's end or inside the parent.
        input_ids: The tokens, at least one.
    """

    parent: int | None
    depth: int
    start: int
    input_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


class Span(NamedTuple):
    """The tokens [start, stop) of a segment."""

    segment: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixTree:
    """Segments in depth-first order, and each sequence's path through them.

    Parents come before their children; the descendants of a segment follow it without a gap, its children in the order
    of their starts. A sequence goes through a segment up to where the next segment of its path starts, through the last
    one up to its own end. Shape legend: S segments, N sequences, E steps of all sequences' paths.

    Attributes:
        sequences: Per sequence (T,) int64, the tokens.
        parents: (S,) int64, `NO_PARENT` at depth 0.
        depths: (S,) int64.
        starts: (S,) int64, positions.
        lengths: (S,) int64.
        sources: (S,) int64, a sequence that holds all of the segment.
        path_segments: (E,) int64, segments from depth 0 down, sequence after sequence.
        path_offsets: (N + 1,) int64, where each sequence's path begins.
    """

    sequences: tuple[IntArray, ...]
    parents: IntArray
    depths: IntArray
    starts: IntArray
    lengths: IntArray
    sources: IntArray
    path_segments: IntArray
    path_offsets: IntArray

    @property
    def num_segments(self) -> int:
        return len(self.parents)

    @property
    def num_unique_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_levels(self) -> int:
        return 1 + int(self.depths.max())

    @cached_property
    def ends(self) -> IntArray:
        """(S,) int64, position after the last token of each segment."""
        return self.starts + self.lengths

    @cached_property
    def path_stops(self) -> IntArray:
        """(E,) int64, the position at which the sequence leaves each segment of its path."""
        stops = np.append(self.starts[self.path_segments][1:], 0)
        stops[self.path_offsets[1:] - 1] = list(map(len, self.sequences))
        return stops

    @cached_property
    def path_sequences(self) -> IntArray:
        """(E,) int64, the sequence that each step belongs to."""
        return np.repeat(np.arange(len(self.sequences)), np.diff(self.path_offsets))

    @cached_property
    def branches_inside(self) -> bool:
        """Whether a segment starts inside its parent."""
        children = np.flatnonzero(self.parents != NO_PARENT)
        return bool((self.starts[children] != self.ends[self.parents[children]]).any())

    @cached_property
    def has_children(self) -> np.ndarray:
        """(S,) bool."""
        found = np.zeros(self.num_segments, dtype=bool)
        found[self.parents[self.parents != NO_PARENT]] = True
        return found

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The segments as records, with their tokens."""
        columns = zip(self.parents.tolist(), self.depths.tolist(), self.starts.tolist(), strict=True)
        return tuple(
            Segment(
                parent=None if parent == NO_PARENT else parent,
                depth=depth,
                start=start,
                input_ids=tuple(self.tokens(index).tolist()),
            )
            for index, (parent, depth, start) in enumerate(columns)
        )

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Per sequence, in the caller's order, the segment indices from depth 0 to its end."""
        return tuple(tuple(path.tolist()) for path in np.split(self.path_segments, self.path_offsets[1:-1]))

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> IntArray:
        """The tokens [start, stop) of a segment; by default all of them."""
        first = int(self.starts[index])
        stop = int(self.lengths[index]) if stop is None else stop
        return self.sequences[self.sources[index]][first + start : first + stop]

    def tokens_of(self, segments: IntArray) -> IntArray:
        """(T,) int64, the tokens of some segments, one after another."""
        columns = (self.sources[segments], self.starts[segments], self.ends[segments])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return np.concatenate([self.sequences[source][start:end] for source, start, end in rows])

    def positions_of(self, segments: IntArray) -> IntArray:
        """(T,) int64, the positions of the tokens of some segments, one after another."""
        return ranges(self.starts[segments], self.lengths[segments])

    def steps(self, index: int) -> Iterator[tuple[int, int, int]]:
        """The path of sequence `index`: segments, each with the positions [start, stop) the sequence takes from it."""
        own = slice(self.path_offsets[index], self.path_offsets[index + 1])
        segments = self.path_segments[own]
        return zip(segments.tolist(), self.starts[segments].tolist(), self.path_stops[own].tolist(), strict=True)

    def sequence(self, index: int) -> tuple[int, ...]:
        """The tokens of sequence `index`, reassembled from its path."""
        return tuple(
            token
            for segment, start, stop in self.steps(index)
            for token in self.tokens(segment, 0, stop - start).tolist()
        )


def ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """(sum of lengths,) int64, the numbers [start, start + length) of each, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
