"""How kinds of data and variants look in pictures: consistent, and distinguishable without colour.

The colours are those of Okabe and Ito (2008, "Color universal design") and tints of them; neighbouring categories
differ in hatch or lightness, and every variant has its own marker and dash.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvpref.profiling.memory import tracker as kinds


class FillStyle(NamedTuple):
    """Style of a category's area."""

    color: str

    hatch: str
    """matplotlib's hatch; lines only, because dots and stars make SVGs many times longer."""


class LineStyle(NamedTuple):
    """Style of a variant's line."""

    color: str

    marker: str

    dash: str
    """matplotlib's line style."""


_FILLS = {
    kinds.PARAMETERS: FillStyle("#4d4d4d", ""),
    kinds.OPTIMIZER: FillStyle("#a6a6a6", ""),
    kinds.GRADIENTS: FillStyle("#e69f00", "\\\\\\"),
    kinds.PREFIX_KV: FillStyle("#0072b2", ""),
    kinds.PREFIX_KV_GRADIENTS: FillStyle("#0072b2", "xxx"),
    kinds.PIXEL_INPUTS: FillStyle("#f7f3b0", ""),
    kinds.IMAGE_FEATURES: FillStyle("#f0e442", ""),
    kinds.IMAGE_FEATURE_GRADIENTS: FillStyle("#f0e442", "xxx"),
    kinds.VISION_ACTIVATIONS: FillStyle("#c2b60d", "///"),
    kinds.BACKWARD: FillStyle("#d55e00", "---"),
    kinds.LOG_PROBS: FillStyle("#cc79a7", "||"),
    kinds.OTHER: FillStyle("#ffffff", ""),
}
_ACTIVATION_FILLS = (
    FillStyle("#009e73", ""),
    FillStyle("#8fd6bf", "///"),
    FillStyle("#d9f2ea", "|||"),
    FillStyle("#56b4e9", "+++"),
    FillStyle("#b7e1f7", "\\\\"),
    FillStyle("#5b8a3c", "xx"),
)
_UNKNOWN_FILL = FillStyle("#f0e442", "//")

# Bottom to top of a stack: first what stays for the whole step, then what comes and goes.
_ORDER = (
    kinds.PARAMETERS,
    kinds.OPTIMIZER,
    kinds.GRADIENTS,
    kinds.PREFIX_KV,
    kinds.PREFIX_KV_GRADIENTS,
    kinds.PIXEL_INPUTS,
    kinds.IMAGE_FEATURES,
    kinds.IMAGE_FEATURE_GRADIENTS,
    kinds.VISION_ACTIVATIONS,
)
_ORDER_LAST = (kinds.LOG_PROBS, kinds.BACKWARD, kinds.OTHER)

_LINES = {
    "full": LineStyle("#0072b2", "o", "-"),
    "bounded": LineStyle("#009e73", "s", "--"),
    "one_pass": LineStyle("#cc79a7", "v", ":"),
    "packed": LineStyle("#e69f00", "^", "-."),
    "padded": LineStyle("#4d4d4d", "D", (0, (1, 1))),  # type: ignore[arg-type]
}
_UNKNOWN_LINE = LineStyle("#000000", "x", "-")


def fill_style(category: str) -> FillStyle:
    if category.startswith(kinds.ACTIVATIONS) and category not in _FILLS:
        number = category.rpartition(" ")[2]
        return _ACTIVATION_FILLS[int(number) % len(_ACTIVATION_FILLS)] if number.isdigit() else _UNKNOWN_FILL
    return _FILLS.get(category, _UNKNOWN_FILL)


def line_style(variant: str) -> LineStyle:
    return _LINES.get(variant, _UNKNOWN_LINE)


def in_order(categories: Iterable[str]) -> list[str]:
    """Categories in the order in which they are stacked and listed."""

    def place(name: str) -> tuple[int, str]:
        if name in _ORDER:
            return _ORDER.index(name), ""
        if name in _ORDER_LAST:
            return len(_ORDER) + 1 + _ORDER_LAST.index(name), ""
        return len(_ORDER), name

    return sorted(categories, key=place)
