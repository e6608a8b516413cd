"""The prefix tree of a group as a picture. matplotlib (the extra `plot`) is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvpref.atomic_files import replacing
from kvpref.data.tree_picture.group_tree import GroupTree
from kvpref.data.tree_picture.runs import Run, children_of
from kvpref.data.tree_picture.style import GREY, INK, color_of, height_of, legend_counts, pale
from kvpref.errors import InputError

SUFFIXES = (".svg", ".png", ".pdf")
DPI = 150
_WIDTH_INCHES, _ROW_INCHES, _LEAST_ROW_INCHES, _AROUND_INCHES = 10.0, 0.46, 0.17, 1.9
_PAD_INCHES = 0.15
_MAX_ROOMY_ROWS = 40
_MAX_NAMED_ENDS = 8  # where others continue: more would overlap
_RC: Any = {"svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif", "svg.hashsalt": "kvpref"}
# Metadata, left out so that the same tree gives the same file.
_METADATA = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}, ".pdf": {"CreationDate": None}}


def check_picture(path: Path) -> None:
    """Fail early if a picture cannot be drawn.

    Raises:
        InputError: If the file's suffix is not supported, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: pictures end in one of {', '.join(SUFFIXES)}; rename the file")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError('pictures need matplotlib: pip install "kvpref[plot]"') from error


def draw_tree(tree: GroupTree, path: Path) -> None:
    """Draw the runs of a group's sequences from left to right by token position, and write the picture.

    Args:
        tree: The tree to draw.
        path: The file; SVG, PNG or PDF by its suffix.

    Raises:
        InputError: As `check_picture`.
        RunError: If the file cannot be written.
    """
    check_picture(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    children = children_of(tree.runs)
    heights = place_runs(tree.runs, children)
    num_rows = sum(not children[index] for index in range(len(tree.runs)))
    row_inches = _ROW_INCHES if num_rows <= _MAX_ROOMY_ROWS else _LEAST_ROW_INCHES
    with matplotlib.rc_context(_RC):
        # No pyplot: it would choose a backend for the whole process.
        size = (_WIDTH_INCHES, _AROUND_INCHES + row_inches * num_rows)
        layout = ConstrainedLayoutEngine(w_pad=_PAD_INCHES, h_pad=_PAD_INCHES / 2)
        figure = Figure(figsize=size, dpi=DPI, layout=layout)
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        for index, run in enumerate(tree.runs):
            _draw_run(ax, tree, run, heights[index])
            _draw_branches(ax, run.stop, heights[index], [heights[child] for child in children[index]])
        _label_leaves(ax, tree, children, heights, row_inches)
        _finish(figure, ax, tree, num_rows)
        with replacing(path) as partial:
            figure.savefig(partial, dpi=DPI, metadata=_METADATA[path.suffix.lower()])


def place_runs(runs: tuple[Run, ...], children: dict[int | None, list[int]]) -> list[float]:
    """The vertical place of each run: leaves at 0, 1, 2..., others in the middle of their children."""
    order: list[int] = []
    stack = list(reversed(children[None]))
    while stack:
        order.append(stack.pop())
        stack.extend(reversed(children[order[-1]]))
    places = [0.0] * len(runs)
    for row, leaf in enumerate(index for index in order if not children[index]):
        places[leaf] = float(row)
    for index in reversed(order):
        if children[index]:
            places[index] = (places[children[index][0]] + places[children[index][-1]]) / 2
    return places


def _draw_run(ax: Any, tree: GroupTree, run: Run, place: float) -> None:
    num_sequences = len(tree.batch.parts)
    color, height = color_of(len(run.holders), num_sequences), height_of(len(run.holders), num_sequences)
    low = place - height / 2
    outline = {"edgecolor": color, "linewidth": 0.6, "zorder": 2}
    ax.broken_barh([(run.start, len(run))], (low, height), facecolor=pale(color), **outline)
    spans = [(first, stop - first) for first, stop in run.scored]
    ax.broken_barh(spans, (low, height), facecolor=color, linewidth=0, zorder=3)
    if run.ends_inside:
        top = low - 0.06
        ax.plot([run.stop] * 2, [top, low + height + 0.06], color=INK, linewidth=1.1, zorder=4)
        if sum(other.ends_inside for other in tree.runs) <= _MAX_NAMED_ENDS:
            ax.text(run.stop, top, tree.numbers(run.ending), ha="right", va="bottom", fontsize=7, color=INK, zorder=4)


def _draw_branches(ax: Any, position: int, place: float, others: list[float]) -> None:
    if len(others) > 1:
        ends = [min(*others, place), max(*others, place)]
        ax.plot([position] * 2, ends, color=GREY, linewidth=1.2, zorder=1, solid_capstyle="round")


def _label_leaves(
    ax: Any, tree: GroupTree, children: dict[int | None, list[int]], heights: list[float], row_inches: float
) -> None:
    """Label leaves at the right edge, where the layout leaves room, with a dotted line from each bar's end."""
    leaves = [index for index in range(len(tree.runs)) if not children[index]]
    right = 1.01 * max(run.stop for run in tree.runs)
    for leaf in leaves:
        ends = [tree.runs[leaf].stop, right]
        ax.plot(ends, [heights[leaf]] * 2, color="#b8bec6", linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
    size = 9 if row_inches == _ROW_INCHES else 7
    labels = [tree.label(tree.runs[leaf].ending) for leaf in leaves]
    ax.set_yticks([heights[leaf] for leaf in leaves], labels, fontsize=size)
    ax.yaxis.tick_right()
    ax.tick_params(axis="y", length=0, pad=4)
    ax.set_xlim(0, right)


def _finish(figure: Any, ax: Any, tree: GroupTree, num_rows: int) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.ticker import FuncFormatter

    ax.set_ylim(num_rows - 0.4, -0.6)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xlabel("token position")
    ax.spines[["top", "left", "right"]].set_visible(False)
    ax.set_title(tree.title, loc="left", fontsize=13, fontweight="bold", pad=24, color=INK)
    ax.annotate(
        tree.facts, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", fontsize=10, color=GREY
    )
    handles, labels = _legend(tree)
    figure.legend(
        handles,
        labels,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower left",
        frameon=False,
        ncols=min(4, len(handles)),
        fontsize=9,
    )


def _legend(tree: GroupTree) -> tuple[list[Any], list[str]]:
    """Handles and labels: first the colours, then what is filled and what is pale."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    num_sequences = len(tree.batch.parts)
    handles: list[Any] = []
    labels: list[str] = []
    for count in reversed(legend_counts({len(run.holders) for run in tree.runs})):
        color = color_of(count, num_sequences)
        handles.append(tuple(Patch(facecolor=fill, edgecolor=color, linewidth=0.6) for fill in (color, pale(color))))
        held = "one sequence" if count == 1 else f"{count} sequences"
        of_all = "both sequences" if count == 2 else f"all {held}"
        labels.append(f"in {of_all if 1 < count == num_sequences else held}")
    for name, fill in ((f"filled: scored ({tree.scored_name})", GREY), ("pale: read, not scored", pale(GREY))):
        handles.append(Patch(facecolor=fill, edgecolor=GREY, linewidth=0.6))
        labels.append(name)
    if any(run.ends_inside for run in tree.runs):
        handles.append(Line2D([], [], color=INK, linestyle="", marker="|", markersize=9))
        labels.append(f"this {tree.noun} ends, others continue")
    return handles, labels
