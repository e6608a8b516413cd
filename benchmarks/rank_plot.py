"""The plot of `ranks.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {True: "#2a6f97", False: "#c9a227"}


def plot(rows: Sequence[Any], path: Path) -> None:
    """Plot step time over that of evenly spread work, at 64 ranks, against groups per rank; one panel per schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    schedules = list(dict.fromkeys(row.schedule for row in rows))
    figure, axes = pyplot.subplots(1, len(schedules), figsize=(4 * len(schedules), 3.4), sharey=True)
    for panel, schedule in zip(axes, schedules, strict=True):
        own = [row for row in rows if row.schedule == schedule and row.num_ranks == 64]
        least = {row.file: min(other.budget for other in own if other.file == row.file) for row in own}
        own = [row for row in own if row.budget == least[row.file]]
        for index, name in enumerate(dict.fromkeys(row.file for row in own)):
            of_file = [row for row in own if row.file == name]
            groups = [row.groups_per_rank for row in of_file]
            colour = f"C{index}"
            panel.plot(groups, [row.ratio for row in of_file], marker="o", color=colour, label=name)
            panel.plot(groups, [row.unbalanced_ratio for row in of_file], linestyle=":", color=colour)
        panel.axhline(1.05, color="grey", linewidth=0.8)
        panel.set_title({"step": "wait at the step's end"}.get(schedule, f"FSDP2, {schedule}"), fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_xticks(groups, list(map(str, groups)))
        panel.set_xlabel("groups per rank and step (64 ranks)")
    axes[0].set_ylabel("step time / evenly spread")
    axes[0].legend(fontsize=8, title="solid: balanced, dotted: as they come", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
