"""What a picture must not do to its words, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest


@contextmanager
def figures_drawn() -> Iterator[list[Any]]:
    """The figures that are saved inside."""
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure, "savefig", lambda figure, *args, **kwargs: (drawn.append(figure), save(figure, *args, **kwargs))
        )
        yield drawn


def check_words(figure: Any) -> None:
    """All words of a figure are inside of it, and none lie on others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes, outside = {}, _labels_outside(figure)
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible() and text not in outside:
            boxes[text] = text.get_window_extent(renderer)
    assert boxes
    for text, box in boxes.items():
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text.get_text()!r} is cut off"
    for (text, box), (other, around) in combinations(boxes.items(), 2):
        # A pixel of two boxes' blank rims does no harm.
        across = min(box.x1, around.x1) - max(box.x0, around.x0) > 1
        up = min(box.y1, around.y1) - max(box.y0, around.y0) > 1
        assert not (across and up), f"{text.get_text()!r} lies on {other.get_text()!r}"


def _labels_outside(figure: Any) -> set[Any]:
    """Labels of ticks beyond an axis's limits, which matplotlib keeps and does not draw."""
    return {
        label
        for axes in figure.axes
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if not min(limits) <= tick.get_loc() <= max(limits)
        for label in (tick.label1, tick.label2)
    }
