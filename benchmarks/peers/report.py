"""Comparisons as JSON, as a table and as a picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from peers.agreement import GRADIENT_TOLERANCE, LOGP_TOLERANCE, LOSS_TOLERANCE
from peers.comparison import Comparison, Side, Timing
from peers.task import Task

PACKAGES = ("kvpref", "torch", "transformers", "trl", "prefix-grouper")


def to_json(comparisons: Sequence[Comparison], task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything about a run, ready for `json.dumps`.

    Args:
        comparisons: One per peer and setting.
        task: What they were run on.
        settings: How they were run: data, steps, pairs and rounds.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": task.device,
        },
        "settings": {
            **settings,
            "learning_rate": task.learning_rate,
            "beta": task.beta,
            "seed": task.seed,
            "model": task.model_settings,
        },
        "tolerances": {"logps": LOGP_TOLERANCE, "gradient": GRADIENT_TOLERANCE, "losses": LOSS_TOLERANCE},
        "peers": [_comparison_json(comparison) for comparison in comparisons],
    }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    timing = comparison.timing
    return {
        "name": comparison.peer.name,
        "setting": comparison.peer.setting,
        "batching": comparison.peer.batching,
        "description": comparison.peer.description,
        "verdict": comparison.verdict,
        "reason": comparison.reason,
        "first_batch_relative_differences": comparison.agreement,
        "losses_relative_difference": comparison.loss_difference,
        "timing": None if timing is None else _timing_json(timing),
    }


def _timing_json(timing: Timing) -> dict[str, Any]:
    return {
        "first_counted_step": timing.first_counted + 1,
        "speedup": timing.speedup,
        "ideal": timing.ideal,
        "efficiency": timing.speedup / timing.ideal,
        "total_speedup": timing.total_speedup,
        "total_ideal": timing.total_ideal,
        "kvpref": _side_json(timing, timing.ours),
        "peer": _side_json(timing, timing.theirs),
    }


def _side_json(timing: Timing, side: Side) -> dict[str, Any]:
    seconds = timing.counted_seconds(side)
    return {
        "median_step_seconds": median(seconds),
        "spread": timing.spread(side),
        "gflops_per_second": timing.counted_flops(side) * len(side.seconds) / sum(seconds) / 1e9,
        "optimizer_share": timing.optimizer_share(side),
        "operating_system_share": timing.system_share(side),
        "precompute_seconds": side.precompute_seconds,
        "step_seconds": side.seconds,
        "losses": side.losses,
        "steps": [
            {"tokens": work.num_tokens, "head_rows": work.num_head_rows, "flops": work.flops._asdict()}
            for work in side.work
        ],
    }


def print_tables(comparisons: Sequence[Comparison], console: Console) -> None:
    """The summary, the losses step by step, and why peers were not timed."""
    summary = Table(title="seconds per optimizer step, kvpref beside its peers")
    for column in ("peer", "batches", "kvpref (median)", "peer (median)", "speedup", "ideal", "efficiency", "tokens"):
        summary.add_column(column)
    for comparison in comparisons:
        if comparison.timing is not None:
            summary.add_row(comparison.peer.name, comparison.peer.batching, *_cells(comparison.timing))
    if summary.rows:
        console.print(summary)
    for comparison in comparisons:
        if comparison.agreement is not None:
            shown = (f"{name} {value:.1e}" for name, value in comparison.agreement.items() if value is not None)
            console.print(f"{comparison.peer.name}: first batch, relative differences: {', '.join(shown)}")
        if comparison.timing is not None:
            console.print(_losses_table(comparison.peer.name, comparison.timing))
        if comparison.reason is not None:
            console.print(f"{comparison.peer.name}: {comparison.verdict}: {comparison.reason}", markup=False)


def _cells(timing: Timing) -> list[str]:
    ours, theirs = (
        f"{median(timing.counted_seconds(side)):.3g} ±{timing.spread(side) / 2:.0%}"
        for side in (timing.ours, timing.theirs)
    )
    tokens = [sum(work.num_tokens for work in side.work) for side in (timing.ours, timing.theirs)]
    efficiency = timing.speedup / timing.ideal
    ratios = [f"{timing.speedup:.2f}x", f"{timing.ideal:.2f}x", f"{efficiency:.2f}"]
    return [ours, theirs, *ratios, " / ".join(map(str, tokens))]


def _losses_table(name: str, timing: Timing) -> Table:
    table = Table(title=f"{name}: step by step")
    for column in ("step", "loss, kvpref", "loss, peer", "seconds, kvpref", "seconds, peer", "ideal"):
        table.add_column(column)
    ours, theirs = timing.ours, timing.theirs
    for step, (our_work, their_work) in enumerate(zip(ours.work, theirs.work, strict=True)):
        seconds = [f"{median(times[step] for times in side.seconds):.3g}" for side in (ours, theirs)]
        losses = [f"{side.losses[step]:.6f}" for side in (ours, theirs)]
        table.add_row(str(step + 1), *losses, *seconds, f"{their_work.flops.total / our_work.flops.total:.2f}x")
    return table


def draw(comparisons: Sequence[Comparison], path: Path) -> bool:
    """Write a PNG of the timed peers: losses, seconds per step, speedup beside the ideal.

    Returns:
        False if nothing was timed or matplotlib is not installed; nothing is written then.
    """
    timings = {comparison.peer.name: comparison.timing for comparison in comparisons if comparison.timing is not None}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not timings:
        return False
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    losses, seconds, speedups = figure.subplots(1, 3)
    for name, timing in timings.items():
        steps = range(1, len(timing.ours.losses) + 1)
        (line,) = losses.plot(steps, timing.ours.losses, linewidth=5, alpha=0.35, label=f"kvpref beside {name}")
        losses.plot(steps, timing.theirs.losses, linewidth=1, color=line.get_color(), label=name)
    losses.set(title="loss of each step (nats)", xlabel="optimizer step")
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.legend(fontsize=8)
    sides = {"kvpref": [t.ours for t in timings.values()], "peer": [t.theirs for t in timings.values()]}
    medians = {
        label: [median(t.counted_seconds(side)) for t, side in zip(timings.values(), of_peers, strict=True)]
        for label, of_peers in sides.items()
    }
    _bars(seconds, list(timings), medians, "{:.2g}")
    seconds.set(title="seconds per step (median)")
    ratios = {"speedup": [t.speedup for t in timings.values()], "FLOP ideal": [t.ideal for t in timings.values()]}
    _bars(speedups, list(timings), ratios, "{:.2f}x")
    speedups.set(title="speedup of kvpref")
    for axis in (losses, seconds, speedups):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True


def _bars(axis: Any, names: list[str], heights: dict[str, list[float]], label: str) -> None:
    """One group of bars per name."""
    width = 0.8 / len(heights)
    for index, (series, values) in enumerate(heights.items()):
        places = [place + (index - (len(heights) - 1) / 2) * width for place in range(len(names))]
        bars = axis.bar(places, values, width, label=series)
        axis.bar_label(bars, labels=[label.format(value) for value in values], fontsize=8)
    axis.set_xticks(range(len(names)), names)
    axis.legend(fontsize=8)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The model's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
