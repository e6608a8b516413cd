"""Speed-ups and their ideals as a picture."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

from kvpref.atomic_files import replacing
from kvpref.profiling.compare.report import Report

_MEASURED, _IDEAL = "#7cc4a8", "#222222"
_BARS_INCHES, _INCHES_PER_CHARACTER, _PAD_INCHES = 7.5, 0.085, 0.1
_TITLE_COLUMNS = 70  # as many characters as the narrowest picture holds


def draw(report: Report, path: Path) -> bool:
    """Write a PNG: a bar per case with the quartiles of its speed-up, and a mark at its ideal.

    Returns:
        False if matplotlib (the extra `plot`) is not installed or there is nothing to draw; nothing is written then.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        return False
    rows = [(comparison, result) for comparison in report.comparisons for result in comparison.contenders()]
    if not rows:
        return False
    several = len({result.name for _, result in rows}) > 1
    labels = [f"{c.name}, {r.name}" if several else c.name for c, r in rows]
    places = list(range(len(rows)))
    medians = [r.speedup.median for _, r in rows]
    below = [r.speedup.median - r.speedup.lower_quartile for _, r in rows]
    above = [r.speedup.upper_quartile - r.speedup.median for _, r in rows]
    # No pyplot: it would choose a backend for the whole process.
    title = wrap(report.title, _TITLE_COLUMNS) or [""]
    label_inches = _INCHES_PER_CHARACTER * max(map(len, labels))
    size = (_BARS_INCHES + label_inches, 1.3 + 0.25 * len(title) + 0.42 * len(rows))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=_PAD_INCHES, h_pad=_PAD_INCHES))
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.barh(places, medians, height=0.6, color=_MEASURED, label="measured (median, quartiles)")
    ax.errorbar(medians, places, xerr=[below, above], fmt="none", ecolor="black", capsize=3)
    ax.plot([r.ideal for _, r in rows], places, "|", color=_IDEAL, markersize=18, markeredgewidth=2, label="ideal")
    widest = max(max(r.ideal, r.speedup.upper_quartile) for _, r in rows)
    for place, (_, result) in zip(places, rows, strict=True):
        right = max(result.ideal, result.speedup.upper_quartile) + 0.02 * widest
        ax.text(right, place, f"{result.efficiency.median:.2f} of the ideal", va="center", fontsize=9)
    ax.axvline(1, color="#999999", linewidth=0.8)
    ax.set_yticks(places, labels)
    ax.set_xlim(0, 1.35 * widest)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set(xlabel=f"speed-up over {', '.join(dict.fromkeys(comparison.baseline for comparison, _ in rows))}")
    figure.suptitle("\n".join(title), fontsize=12)
    figure.legend(loc="outside lower center", frameon=False, ncols=2)
    ax.spines[["top", "right"]].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)
    return True
