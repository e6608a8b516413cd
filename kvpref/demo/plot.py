"""The picture of a demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpref.atomic_files import replacing

if TYPE_CHECKING:
    from kvpref.demo.result import DemoResult

STAGE_LABELS = {"start": "start", "sft": "after sft", "dpo": "after dpo"}
_COLORS = {"two_pass": "#1b7f5c", "packed": "#c98a1b", "padded": "#8a8f98"}
_ACCURACY, _PREFERENCE, _MARGIN = "#2b5fa5", "#8fb4de", "#7a4fa3"


def draw(result: DemoResult, path: Path) -> bool:
    """Write the picture as PNG.

    Returns:
        False if matplotlib is not installed; nothing is written then.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # No pyplot: it would choose a backend for the whole process.
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    _draw_losses(axes[0, 0], result, "sft", _ACCURACY, "loss per token (nats)")
    _draw_losses(axes[0, 1], result, "dpo", _MARGIN, "loss (nats)")
    _draw_accuracies(axes[0, 2], result)
    _draw_margins(axes[1, 0], result)
    _draw_tokens(axes[1, 1], result)
    _draw_times(axes[1, 2], result)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)
    return True


def _draw_losses(ax: Any, result: DemoResult, stage: str, color: str, label: str) -> None:
    curve = result.loss_curves[stage]
    ax.plot([point.step for point in curve], [point.loss for point in curve], color=color, marker="o", markersize=3)
    ax.set(title=f"{stage}: training loss", xlabel="optimizer step", ylabel=label)
    ax.set_ylim(bottom=0)


def _draw_accuracies(ax: Any, result: DemoResult) -> None:
    evaluations = [result.evaluations[stage] for stage in STAGE_LABELS]
    right = [100 * evaluation.accuracy for evaluation in evaluations]
    preferred = [100 * evaluation.preference_accuracy for evaluation in evaluations]
    _draw_pairs_of_bars(
        ax, right, preferred, ("right answers", "right preferences"), (_ACCURACY, _PREFERENCE), "{:.0f}"
    )
    ax.set(title="held-out questions", ylabel="share (%)", ylim=(0, 125))
    ax.set_yticks(range(0, 101, 20))


def _draw_margins(ax: Any, result: DemoResult) -> None:
    margins = [result.evaluations[stage].logp_margin for stage in STAGE_LABELS]
    bars = ax.bar(list(STAGE_LABELS.values()), margins, color=_MARGIN, width=0.55)
    ax.bar_label(bars, fmt="{:.1f}", padding=2)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.margins(y=0.15)
    ax.set(title="margin, chosen over rejected", ylabel="log-prob difference (nats)")


def _draw_pairs_of_bars(
    ax: Any, left: list[float], right: list[float], names: tuple[str, str], colors: tuple[str, str], fmt: str
) -> None:
    for offset, values, name, color in zip((-0.2, 0.2), (left, right), names, colors, strict=True):
        bars = ax.bar([index + offset for index in range(len(values))], values, width=0.38, label=name, color=color)
        ax.bar_label(bars, fmt=fmt, padding=2)
    ax.set_xticks(range(len(STAGE_LABELS)), list(STAGE_LABELS.values()))
    ax.legend(loc="upper left", frameon=False, ncols=2)


def _draw_tokens(ax: Any, result: DemoResult) -> None:
    tokens = {cost.mode: cost.num_forward_tokens for cost in result.comparison.costs}
    _draw_modes(ax, tokens, "{:.0f}")
    ax.set(title="tokens through the layers", ylabel="tokens per step")


def _draw_times(ax: Any, result: DemoResult) -> None:
    times = {cost.mode: cost.time_ms for cost in result.comparison.costs}
    _draw_modes(ax, times, "{:.0f} ms")
    ax.set(title="forward and backward", ylabel="time per step (ms)")


def _draw_modes(ax: Any, values: dict[str, float], fmt: str) -> None:
    bars = ax.bar(list(values), list(values.values()), color=[_COLORS[mode] for mode in values], width=0.55)
    shared = values["two_pass"]
    labels = [
        fmt.format(value) + ("" if mode == "two_pass" else f"\n({value / shared:.2f}x)")
        for mode, value in values.items()
    ]
    ax.bar_label(bars, labels=labels, padding=2)
    ax.margins(y=0.2)
