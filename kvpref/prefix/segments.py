"""Where segments begin and what they leave: what layers with a recurrent state need to know of a pass.

Pure Python integers.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

from kvpref.prefix.levels import LevelSegments
from kvpref.prefix.tree import PrefixTree

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
