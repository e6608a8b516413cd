"""Where segments begin and which states they leave, for layers with a recurrent state.

Integers.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

from kvpref.prefix.levels import LevelSegments
from kvpref.prefix.slab_reads import SlabKey
from kvpref.prefix.tree import NO_PARENT, PrefixTree, Span

BEGINNING = -1
"""Parent of a segment that begins a sequence."""


@dataclass(frozen=True, kw_only=True)
class SegmentLayout:
    """Segments that stand in the rows of a level, one after another.

    Attributes:
        lengths: Rows of each segment.
        parents: For each segment, the index of the earlier state it starts from, or `BEGINNING`.
        kept: The segments whose final state others start from, in the order in which these states are left.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """T, the rows of all segments."""
        return sum(self.lengths)


def level_segments(tree: PrefixTree, levels: AbstractSequence[LevelSegments]) -> tuple[SegmentLayout, ...]:
    """The segments of each level; each level starts from states that the level before left.

    None where sequences branch off inside segments: no state is left there.
    """
    if tree.branches_inside:
        return ()
    has_children, all_parents, lengths = tree.has_children.tolist(), tree.parents.tolist(), tree.lengths.tolist()
    found = []
    places: dict[int, int] = {NO_PARENT: BEGINNING}
    for level in levels:
        kept = [place for place, index in enumerate(level.segments) if has_children[index]]
        found.append(
            SegmentLayout(
                lengths=tuple(lengths[index] for index in level.segments),
                parents=tuple(places[all_parents[index]] for index in level.segments),
                kept=tuple(kept),
            )
        )
        places = {NO_PARENT: BEGINNING} | {level.segments[place]: number for number, place in enumerate(kept)}
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class ChunkStates:
    """The states that a chunk of the bounded schedule starts from and leaves, in slabs.

    Attributes:
        layout: The layout of its spans; their parents index the states of all `reads`, one after another.
        reads: The slabs that hold these states, and which states [start, stop) of each.
        first: Where its own states begin in the slab of its keys and values.
    """

    layout: SegmentLayout
    reads: tuple[tuple[SlabKey, int, int], ...]
    first: int


NO_STATES = ChunkStates(layout=SegmentLayout(lengths=(), parents=(), kept=()), reads=(), first=0)
"""The states of a chunk whose segments others branch off from inside."""


class StatePlaces:
    """Gives every state that is read later a place in its segment's slab, in the order in which chunks run.

    Attributes:
        num_states: States of each slab so far.

    Args:
        tree: The prefix tree.
        slab_of: Per segment, its slab.
    """

    def __init__(self, tree: PrefixTree, slab_of: AbstractSequence[SlabKey]) -> None:
        self.num_states: dict[SlabKey, int] = {}
        self._slab_of = slab_of
        self._has_children, self._parents, self._lengths = (
            values.tolist() for values in (tree.has_children, tree.parents, tree.lengths)
        )
        self._places: dict[tuple[int, int], int] = {}  # (segment, how many of its tokens have run) -> place

    def chunk(self, spans: AbstractSequence[Span]) -> ChunkStates:
        """The states of a chunk; call it for the chunks that it reads from first."""
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
        """The slab and the number of the state that a span starts from."""
        if span.start:  # where the piece before it ended
            return self._slab_of[span.segment], self._places[span.segment, span.start]
        parent = self._parents[span.segment]
        if parent == NO_PARENT:
            return None
        return self._slab_of[parent], self._places[parent, self._lengths[parent]]

    def _is_read(self, span: Span) -> bool:
        return span.stop < self._lengths[span.segment] or self._has_children[span.segment]
