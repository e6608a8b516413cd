"""How runs look: the more sequences hold one, the darker and thicker it is; scored tokens are filled.

Distinguishable without colour, too. Shared runs are blue, those of one sequence green (Okabe and Ito, 2008).
"""

from __future__ import annotations

OWN = "#009e73"
FEW, ALL = (0x8C, 0xC4, 0xE8), (0x00, 0x3F, 0x70)
GREY = "#6b7280"
INK = "#1f2933"
PALE = 0.28
"""Share of the colour in the fill of tokens that are not scored; the rest is white."""

THIN, THICK = 0.36, 0.80
"""Height of a run held by one sequence, and by all; 1 is the distance between two sequences."""

MAX_LEGEND_COUNTS = 5


def color_of(num_holders: int, num_sequences: int) -> str:
    """The colour of a run as a hex string, by how many of the sequences hold it."""
    if num_holders <= 1:
        return OWN
    share = (num_holders - 2) / max(1, num_sequences - 2) if num_sequences > 2 else 1.0
    return _hex(tuple(round(few + share * (many - few)) for few, many in zip(FEW, ALL, strict=True)))


def pale(color: str) -> str:
    """The fill of tokens that are not scored."""
    return _hex(tuple(round(255 - PALE * (255 - int(color[place : place + 2], 16))) for place in (1, 3, 5)))


def height_of(num_holders: int, num_sequences: int) -> float:
    """The height of a run, in distances between two sequences."""
    return THIN + (THICK - THIN) * (num_holders - 1) / max(1, num_sequences - 1)


def legend_counts(counts: set[int]) -> list[int]:
    """The numbers of holders shown in a legend: all that occur, or an evenly spread selection."""
    ordered = sorted(counts)
    if len(ordered) <= MAX_LEGEND_COUNTS:
        return ordered
    places = [round(step * (len(ordered) - 1) / (MAX_LEGEND_COUNTS - 1)) for step in range(MAX_LEGEND_COUNTS)]
    return [ordered[place] for place in places]


def _hex(parts: tuple[int, ...]) -> str:
    return "#" + "".join(f"{part:02x}" for part in parts)
