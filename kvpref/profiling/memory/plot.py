"""Pictures of memory profiles. matplotlib (the extra `plot`) is imported when one is drawn."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from kvpref.atomic_files import replacing
from kvpref.errors import InputError
from kvpref.profiling.memory.profile import MemoryProfile
from kvpref.profiling.memory.report import MemoryReport, format_bytes
from kvpref.profiling.memory.style import fill_style, in_order, line_style
from kvpref.profiling.memory.timeline import MemorySnapshot

Plot = Callable[[Any], None]
"""Draws on matplotlib axes."""

MAX_DRAWN_POINTS = 240
SHORT_NAMES = {
    "backward pass ": "b",
    "recompute pass ": "r",
    "pass ": "p",
    "backward vision tower": "bv",
    "recompute vision tower": "rv",
    "vision tower": "v",
}
"""Short names in timelines: ``backward pass 2`` becomes b2 if there is no room."""

_MIB = 2**20
_CHARACTER_INCHES, _LEGEND_INCHES = 0.068, 2.6  # of a region's name, and beside a timeline
_RC: Any = {"svg.fonttype": "none", "hatch.linewidth": 0.5, "font.size": 10, "font.family": "sans-serif"}
# SVG metadata, left out so that a page contains no URLs.
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def require_matplotlib() -> None:
    """Fail early if pictures cannot be drawn.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError('pictures need matplotlib: pip install "kvpref[plot]"') from error


def draw_report(report: MemoryReport, path: Path) -> None:
    """Write a PNG: peaks by number of responses, if several were measured, and what is held at the peaks.

    Raises:
        InputError: If matplotlib is not installed.
    """
    plots = breakdown_plots(report.largest())
    if len(report.responses) > 1:
        plots.insert(0, lambda ax: plot_peaks(ax, report))
    path.parent.mkdir(parents=True, exist_ok=True)
    _render(plots, (5 * len(plots) + 2, 4.6), path, dpi=120)


def render_svg(plots: Sequence[Plot], size: tuple[float, float], *, name: str, label: str) -> str:
    """Pictures side by side as one SVG for use inside an HTML page.

    Args:
        plots: What to draw, from left to right.
        size: Width and height, in inches.
        name: Prefix of every id, so that pictures on one page share none.
        label: Text for readers who cannot see it.

    Raises:
        InputError: If matplotlib is not installed.
    """
    buffer = io.StringIO()
    _render(plots, size, buffer, format="svg", metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # hundredths of a point
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    # The page decides the width; viewBox keeps the proportions.
    return re.sub(r'<svg ([^>]*?)\s?width="[^"]*"', rf'<svg role="img" aria-label="{label}" \1', svg, count=1).replace(
        f' height="{size[1] * 72:g}pt"', "", 1
    )


def plot_peaks(ax: Any, report: MemoryReport) -> None:
    """Peak bytes by the number of responses, a line per variant."""
    counts = [count for count in report.responses if count is not None]
    for variant in report.variants:
        found = [(count, profile) for count in counts if (profile := report.find(variant, count)) is not None]
        style = line_style(variant)
        ax.plot(
            [count for count, _ in found],
            [profile.peak.total_bytes / _MIB for _, profile in found],
            color=style.color,
            marker=style.marker,
            linestyle=style.dash,
            label=variant,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set(xlabel="responses per prompt", ylabel="peak memory (MiB)", title="Peak memory of a training step")
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.legend(frameon=False)


def breakdown_plots(profiles: Sequence[MemoryProfile]) -> list[Plot]:
    """What was held at the peaks, in bytes and in shares of each peak."""
    return [
        lambda ax: plot_breakdown(ax, profiles, as_shares=False),
        lambda ax: plot_breakdown(ax, profiles, as_shares=True),
    ]


def plot_breakdown(ax: Any, profiles: Sequence[MemoryProfile], *, as_shares: bool) -> None:
    """What was held at the peak, a bar per variant, in MiB or in percent."""
    places = range(len(profiles))
    units = [profile.peak.total_bytes / 100 if as_shares else _MIB for profile in profiles]
    bottoms = [0.0] * len(profiles)
    for category in in_order({name for profile in profiles for name in profile.peak.bytes_by_category}):
        held = [profile.peak.bytes_by_category.get(category, 0) for profile in profiles]
        heights = [num_bytes / unit for num_bytes, unit in zip(held, units, strict=True)]
        style = _area(category, linewidth=0.5)
        ax.bar(places, heights, bottom=bottoms, width=0.62, label=category, **style)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    ax.set_xticks(places, [profile.variant for profile in profiles])
    if as_shares:
        ax.set(ylabel="share of the peak (%)", title="In shares", ylim=(0, 100))
        _legend_beside(ax)
        return
    for place, profile in zip(places, profiles, strict=True):
        text = format_bytes(profile.peak.total_bytes)
        ax.annotate(text, (place, bottoms[place]), (0, 3), textcoords="offset points", ha="center", va="bottom")
    ax.set_ylim(0, 1.1 * max(bottoms, default=1))
    suffix = "" if profiles[0].num_responses is None else f", N = {profiles[0].num_responses}"
    ax.set(ylabel="memory (MiB)", title=f"Held at the peak{suffix}")


def plot_timeline(ax: Any, timeline: Sequence[MemorySnapshot]) -> None:
    """What was held over a step, a layer per category; above it, the regions."""
    points = thin(timeline, MAX_DRAWN_POINTS)
    events = [point.event for point in points]
    bottoms = [0.0] * len(points)
    for category in in_order({name for point in points for name in point.bytes_by_category}):
        tops = [
            bottom + point.bytes_by_category.get(category, 0) / _MIB
            for bottom, point in zip(bottoms, points, strict=True)
        ]
        filled = _beside([top > bottom for top, bottom in zip(tops, bottoms, strict=True)])
        style = _area(category, linewidth=0.3)
        ax.fill_between(events, bottoms, tops, where=filled, label=category, **style)
        bottoms = tops
    _draw_regions(ax, points)
    ax.set_xlim(events[0], events[-1])
    ax.set_ylim(0, 1.15 * max(bottoms))
    ax.set(xlabel="storages made and freed", ylabel="memory (MiB)")
    _legend_beside(ax)


def thin(points: Sequence[MemorySnapshot], most: int) -> list[MemorySnapshot]:
    """At most `most` points: the highest of each stretch, and the first and last of all."""
    if len(points) <= most:
        return list(points)
    inner, stretches = points[1:-1], most - 2
    edges = [index * len(inner) // stretches for index in range(stretches + 1)]
    highest = [max(inner[start:stop], key=lambda point: point.total_bytes) for start, stop in pairwise(edges)]
    return [points[0], *highest, points[-1]]


def _draw_regions(ax: Any, points: Sequence[MemorySnapshot]) -> None:
    """A tick between regions, and the names of those wide enough to hold them."""
    first, last = points[0].event, max(points[-1].event, points[0].event + 1)
    # The layout comes later: what an axis will have, about.
    inches = ax.figure.get_figwidth() / ax.get_subplotspec().get_gridspec().ncols - _LEGEND_INCHES
    character_width = _CHARACTER_INCHES / inches
    start = first
    for name, inside in groupby(points, key=lambda point: point.region):
        stop = list(inside)[-1].event
        width = (stop - start) / (last - first)
        label = next((text for text in _labels(name) if width > character_width * (len(text) + 1)), "")
        ax.text((start + stop) / 2, 0.985, label, transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=8)
        if width > 0.01:
            ax.axvline(stop, ymin=0.93, color="#777777", linewidth=0.7)
        start = stop


def _labels(region: str | None) -> tuple[str, ...]:
    """Possible names of a region, longest first."""
    name = region or ""
    short = name
    for word, letter in SHORT_NAMES.items():
        short = short.replace(word, letter)
    return (name, short) if region else ()


def _area(category: str, *, linewidth: float) -> dict[str, Any]:
    """matplotlib's arguments for filling the area of a category."""
    style = fill_style(category)
    return {"facecolor": style.color, "hatch": style.hatch, "edgecolor": "black", "linewidth": linewidth}


def _beside(flags: Sequence[bool]) -> list[bool]:
    """Which entries are set or next to one that is, so that layers shrink to nothing at their ends."""
    return [any(flags[max(0, index - 1) : index + 2]) for index in range(len(flags))]


def _legend_beside(ax: Any) -> None:
    """A legend in the order of the stack, from top to bottom."""
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1), frameon=False, handleheight=1.3)


def _render(plots: Sequence[Plot], size: tuple[float, float], target: Path | io.StringIO, **settings: Any) -> None:
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(_RC):
        # No pyplot: it would choose a backend for the whole process.
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        FigureCanvasAgg(figure)
        for ax, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            plot(ax)
            ax.spines[["top", "right"]].set_visible(False)
        if isinstance(target, io.StringIO):
            figure.savefig(target, **settings)
            return
        with replacing(target) as partial:
            figure.savefig(partial, **settings)
