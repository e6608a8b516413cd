"""`kvpref demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from kvpref.demo.result import DemoResult

_STAGES = {"start": "start", "sft": "after sft", "dpo": "after dpo"}


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the data, the model, the result and the picture.")] = Path(
        "outputs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of data, weights and training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Some seconds: all parts run, little is learned.")] = False,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="--no-train: write the model, its tokenizer and data, and stop.")
    ] = True,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on the last line of stdout.")] = False,
) -> None:
    """Train a tiny model on pairs whose answers a program can check, and compare the modes. No download, no GPU.

    Trains with sft, then dpo; prints accuracy and reward margins before and after, and the time and tokens of the
    shared prompts against packed and padded batches. About two minutes on two cores. With --no-train it writes only
    what the tutorials begin with: a model that is right most of the time, its tokenizer, pairs, and groups of answers.

    Example: kvpref demo --output outputs/demo
    """
    from rich.console import Console

    from kvpref.demo.config import DemoConfig
    from kvpref.demo.files import MODEL_FOLDER, PLOT_FILE, write_files
    from kvpref.demo.run import run_demo

    if not train:
        write_files(output, seed)
        print(f"wrote a model, its tokenizer, pairs and groups of scored answers to {output}")
        return
    config = DemoConfig.quick(seed) if quick else DemoConfig(seed=seed)
    result = run_demo(config, output, report=lambda line: print(line, file=sys.stderr, flush=True))
    console = Console()
    console.print(_quality_table(result))
    console.print(_costs_table(result))
    comparison, seconds = result.comparison, result.seconds
    lines = [
        f"modes agree: losses differ by at most {comparison.max_loss_difference:.1e} of their value, "
        f"gradients by {comparison.max_gradient_difference:.1e}",
        f"time: sft {seconds['sft']:.0f} s, dpo {seconds['dpo']:.0f} s, comparison {seconds['comparison']:.0f} s, "
        f"all {seconds['total']:.0f} s",
        f"model: {output / MODEL_FOLDER}",
    ]
    if (output / PLOT_FILE).exists():
        lines.append(f"picture: {output / PLOT_FILE}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if json_:
        print(json.dumps({"output": str(output), **result.to_json()}))


def _quality_table(result: DemoResult) -> Table:
    from rich.table import Table

    table = Table(title="Held-out questions: name the largest of three digits", title_justify="left")
    table.add_column("")
    for label in _STAGES.values():
        table.add_column(label, justify="right")
    found = [result.evaluations[stage] for stage in _STAGES]
    table.add_row("right answers, greedy", *(f"{item.accuracy:.1%}" for item in found))
    table.add_row("chosen more probable than rejected", *(f"{item.preference_accuracy:.1%}" for item in found))
    table.add_row("log-prob margin, chosen - rejected (nats)", *(f"{item.logp_margin:+.2f}" for item in found))
    margins = result.reward_margins
    # Rewards are measured from the sft model, so the untrained one has none worth showing.
    table.add_row("dpo reward margin", "", *(f"{margins[stage]:+.2f}" for stage in ("sft", "dpo")))
    return table


def _costs_table(result: DemoResult) -> Table:
    from rich.table import Table

    table = Table(title="Forward and backward of the same steps", title_justify="left")
    table.add_column("mode")
    for column in ("tokens per step", "token saving of two_pass", "ms per step", "speedup of two_pass"):
        table.add_column(column, justify="right")
    for cost in result.comparison.costs:
        ratios = result.ratios.get(cost.mode)
        saving, speedup = ("", "") if ratios is None else (f"{ratios['tokens']:.2f}x", f"{ratios['time']:.2f}x")
        table.add_row(cost.mode, f"{cost.num_forward_tokens:.0f}", saving, f"{cost.time_ms:.0f}", speedup)
    return table
