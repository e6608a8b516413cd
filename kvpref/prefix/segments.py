"""Where segments begin and what they leave: what layers with a recurrent state need to know of a pass.

Pure Python integers.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

from kvpref.prefix.levels import LevelSegments
from kvpref.prefix.slab_reads import SlabKey
from kvpref.prefix.tree import PrefixTree, Span

BEGINNING = -1
"""Parent of a segment that begins a sequence."""


@dataclass(frozen=True, kw_only=True)
class SegmentLayout:
    """Segments that stand in the rows of a level, one after another.

    Attributes:
        lengths: Rows of each.
        parents: For each, which of the states that were left before is its beginning, or `BEGINNING`.
        kept: Those whose own last state others begin with, in the order in which their states are left.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """T."""
        return sum(self.lengths)


def level_segments(tree: PrefixTree, levels: AbstractSequence[LevelSegments]) -> tuple[SegmentLayout, ...]:
    """The segments of each level, of which each begins with states that the level before left."""
    has_children = {segment.parent for segment in tree.segments}
    found = []
    places: dict[int, int] = {}
    for level in levels:
        parents = (tree.segments[index].parent for index in level.segments)
        kept = [place for place, index in enumerate(level.segments) if index in has_children]
        found.append(
            SegmentLayout(
                lengths=tuple(len(tree.segments[index]) for index in level.segments),
                parents=tuple(BEGINNING if parent is None else places[parent] for parent in parents),
                kept=tuple(kept),
            )
        )
        places = {level.segments[place]: number for number, place in enumerate(kept)}
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class ChunkStates:
    """The states that a chunk of the bounded schedule begins with and leaves, in slabs.

    Attributes:
        layout: Of its spans; their parents are numbers into the states of all `reads`, one after another.
        reads: The slabs that hold them, and which states [start, stop) of each.
        first: Where its own states begin in the slab of its keys and values.
    """

    layout: SegmentLayout
    reads: tuple[tuple[SlabKey, int, int], ...]
    first: int


class StatePlaces:
    """Gives every state that is read later a place in its segment's slab, in the order in which chunks run.

    Attributes:
        num_states: Of each slab, so far.

    Args:
        tree: The prefix tree.
        slab_of: Per segment, its slab.
    """

    def __init__(self, tree: PrefixTree, slab_of: AbstractSequence[SlabKey]) -> None:
        self.num_states: dict[SlabKey, int] = {}
        self._tree, self._slab_of = tree, slab_of
        self._has_children = {segment.parent for segment in tree.segments}
        self._places: dict[tuple[int, int], int] = {}  # by segment and how many of its tokens have run

    def chunk(self, spans: AbstractSequence[Span]) -> ChunkStates:
        """The states of a chunk; those of the chunks that it reads from must have been asked for."""
        begins = [self._begin(span) for span in spans]
        reads = []
        offsets: dict[SlabKey, int] = {}
        num_before = 0
        for slab in sorted({place[0] for place in begins if place is not None}):
            numbers = [place[1] for place in begins if place is not None and place[0] == slab]
            start, stop = min(numbers), max(numbers) + 1
            reads.append((slab, start, stop))
            offsets[slab] = num_before - start
            num_before += stop - start
        slab = self._slab_of[spans[0].segment]
        first = self.num_states.get(slab, 0)
        kept = [number for number, span in enumerate(spans) if self._is_read(span)]
        for number, item in enumerate(kept):
            self._places[spans[item].segment, spans[item].stop] = first + number
        self.num_states[slab] = first + len(kept)
        layout = SegmentLayout(
            lengths=tuple(span.stop - span.start for span in spans),
            parents=tuple(BEGINNING if place is None else offsets[place[0]] + place[1] for place in begins),
            kept=tuple(kept),
        )
        return ChunkStates(layout=layout, reads=tuple(reads), first=first)

    def _begin(self, span: Span) -> tuple[SlabKey, int] | None:
        """The slab and the number of the state that a span begins with."""
        if span.start:  # where the piece before it ended
            return self._slab_of[span.segment], self._places[span.segment, span.start]
        parent = self._tree.segments[span.segment].parent
        if parent is None:
            return None
        return self._slab_of[parent], self._places[parent, len(self._tree.segments[parent])]

    def _is_read(self, span: Span) -> bool:
        is_end = span.stop == len(self._tree.segments[span.segment])
        return not is_end or span.segment in self._has_children
