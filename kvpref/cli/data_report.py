"""What ``kvpref data inspect`` prints: tables on a dataset and its batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvpref.data import BatchStatistics, DataReport, DataStatistics, ImageStatistics, TrajectoryStatistics
    from kvpref.profiling.calibration import Calibration

MAX_BAD_ROWS_SHOWN = 10


def print_data(console: Console, report: DataReport, statistics: DataStatistics) -> None:
    """Print the statistics of a dataset, and what loading changed."""
    from kvpref.data.statistics import DATA_SAVING

    console.print(_lengths_table(report.source, statistics))
    images, trajectories = statistics.images, statistics.trajectories
    _print_facts(
        console,
        {
            "groups": f"{statistics.num_groups} of {report.num_rows} rows, {statistics.num_sequences} sequences",
            "prompt share": f"{statistics.prompt_share:.1%} of {statistics.total_tokens} tokens",
            "data saving": f"{statistics.prefix_saving:.2f}x, {DATA_SAVING} "
            f"({statistics.prompt_saving:.2f}x were it prompts only)",
            **({} if images is None else _image_facts(images, report)),
            **({} if trajectories is None else _trajectory_facts(trajectories, report)),
            "bad rows": f"{len(report.bad_rows)} skipped",
            "prompts cut": f"{report.num_truncated_prompts} groups, {report.prompt_tokens_cut} tokens",
            "responses cut": f"{report.num_truncated_responses} responses, {report.response_tokens_cut} tokens",
        },
    )
    for line in report.notices:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for row in report.bad_rows[:MAX_BAD_ROWS_SHOWN]:
        console.print(f"skipped {row.location}: {row.reason}", markup=False, highlight=False, soft_wrap=True)
    if len(report.bad_rows) > MAX_BAD_ROWS_SHOWN:
        hidden = len(report.bad_rows) - MAX_BAD_ROWS_SHOWN
        console.print(f"skipped {hidden} more; --report FILE writes all", markup=False, highlight=False)


def _image_facts(images: ImageStatistics, report: DataReport) -> dict[str, str]:
    scaled = f", {report.num_scaled_images} of them scaled down" if report.num_scaled_images else ""
    return {
        "images": f"{images.num_images} in {images.num_groups_with_images} groups, {images.num_unique_images} that "
        f"differ{scaled}",
        "image saving": f"{images.image_saving:.2f}x of {images.total_image_tokens} image tokens, "
        f"{images.text_saving:.2f}x of the text",
    }


def _trajectory_facts(trajectories: TrajectoryStatistics, report: DataReport) -> dict[str, str]:
    passes = trajectories.passes_per_task
    rewritten = f", {report.num_rewritten} of them in several token rows" if report.num_rewritten else ""
    return {
        "trajectories": f"{trajectories.num_trajectories} at {trajectories.num_tasks} tasks, "
        f"{trajectories.scored_tokens} tokens scored{rewritten}",
        "a row per call": f"{trajectories.call_tokens} tokens, {trajectories.call_saving:.2f}x the unique ones",
        "whole": f"{trajectories.trajectory_tokens} tokens, {trajectories.trajectory_saving:.2f}x the unique ones",
        "unique": f"{trajectories.unique_tokens} tokens in the prefix trees of the tasks, in {passes.mean:.1f} passes "
        f"per task, at most {passes.max}",
    }


def print_batches(console: Console, batches: BatchStatistics) -> None:
    """Print the micro-batches of a budget."""
    from kvpref.data.statistics import TOKEN_SAVING

    says_fill = batches.budget_fill is not None and not batches.num_larger_groups
    fill = "" if not says_fill else f", budget filled to {batches.budget_fill:.1%}"
    padding = f", {batches.padding_share:.1%} padding" if batches.mode == "padded" else ""
    tokens = batches.tokens_per_micro_batch
    _print_facts(
        console,
        {
            "steps": f"{batches.num_steps} per epoch, {batches.micro_batches_per_step:.2f} micro-batches each",
            "micro-batches": f"{tokens.mean:.0f} tokens on average, at most {tokens.max}, in mode {batches.mode}"
            f"{fill}{padding}",
            **_larger_facts(batches),
            "token saving": f"at least {batches.token_saving:.2f}x, {TOKEN_SAVING}",
            "shared prompts": f"{batches.num_sharing_groups} groups begin like others beyond what is common; "
            f"largest cluster: {batches.largest_cluster}",
            "ranks": f"{batches.world_size}, the busiest {batches.imbalance:.1%} above the mean in {batches.cost_unit}",
        },
    )


def _larger_facts(batches: BatchStatistics) -> dict[str, str]:
    if not batches.num_larger_groups:
        return {}
    return {
        "larger groups": f"{batches.num_larger_groups} take more than the budget by themselves, the largest "
        f"{batches.tokens_per_micro_batch.max} tokens; each runs alone, in chunks (in schedule full on several "
        "processes, and in modes other than two_pass, they are refused)",
    }


def print_prediction(console: Console, batches: BatchStatistics, calibration: Calibration) -> None:
    """Print how long a step takes."""
    seconds = batches.costliest_rank_per_step
    lockstep = ""
    if batches.world_size > 1:
        lockstep = f" ({batches.costliest_micro_batches_per_step:.3g} s if ranks wait at every micro-batch, as in FSDP)"
    _print_facts(
        console,
        {
            "predicted": f"{seconds:.3g} s per optimizer step{lockstep}, {seconds * batches.num_steps:.3g} s per "
            f"epoch, forward and backward in mode {batches.mode}",
            "measured on": f"{calibration.device}, {len(calibration.measurements)} made-up micro-batches; "
            f"fit error {calibration.relative_error:.1%}",
        },
    )


def _print_facts(console: Console, facts: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    # Both tables of facts align.
    table.add_column(min_width=14)
    for label, value in facts.items():
        table.add_row(label, value)
    console.print(table)


def _lengths_table(source: str, statistics: DataStatistics) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(source), title_justify="left")
    table.add_column("tokens")
    for name in ("mean", "p50", "p90", "max"):
        table.add_column(name, justify="right")
    images = statistics.images
    of_images = [] if images is None else [("of which images, if any", images.image_tokens)]
    trajectories = statistics.trajectories
    of_trajectories = []
    if trajectories is not None:
        of_trajectories = [
            ("turns per trajectory", trajectories.turns_per_trajectory),
            ("scored per trajectory", trajectories.scored_tokens_per_trajectory),
        ]
    for label, summary in (
        ("prompt, per group", statistics.prompt_tokens),
        *of_images,
        ("response, EOS included", statistics.response_tokens),
        ("sequences per group (N)", statistics.sequences_per_group),
        *of_trajectories,
    ):
        table.add_row(label, f"{summary.mean:.1f}", str(summary.p50), str(summary.p90), str(summary.max))
    return table
