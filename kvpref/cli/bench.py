"""`kvpref bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpref.atomic_files import check_writable
from kvpref.cli.given_data import GivenData
from kvpref.cli.options import (
    BATCH_SIZE,
    BF16,
    COLUMN,
    DATA,
    DATA_WEIGHTS,
    DEFAULT_BATCH_SIZE,
    DEFAULT_DTYPE,
    DEFAULT_LOSS,
    DTYPE,
    GROUP_BY,
    JSON,
    LOSS,
    MAX_TOKENS,
    MODEL_OR_CONFIG,
    SPLIT,
    TOKENIZER,
    check_counts,
)
from kvpref.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import nn

    from kvpref.losses import PreferenceLoss
    from kvpref.profiling.compare.comparison import CaseResult
    from kvpref.profiling.compare.modes import Cut, ModeComparison
    from kvpref.profiling.compare.report import Column, Report

DEFAULT_MODES = "two_pass,one_pass,packed,padded"


def bench(
    model: Annotated[str, MODEL_OR_CONFIG],
    data: Annotated[list[str], DATA],
    tokenizer: Annotated[str | None, TOKENIZER] = None,
    split: Annotated[str | None, SPLIT] = None,
    column: Annotated[list[str] | None, COLUMN] = None,
    group_by: Annotated[str | None, GROUP_BY] = None,
    data_weights: Annotated[str | None, DATA_WEIGHTS] = None,
    modes: Annotated[str, typer.Option(help="Modes, separated by commas; packed is always run.")] = DEFAULT_MODES,
    batch_size: Annotated[int, BATCH_SIZE] = DEFAULT_BATCH_SIZE,
    max_tokens: Annotated[int | None, MAX_TOKENS] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; every mode is timed once in each.")] = 5,
    loss: Annotated[str, LOSS] = DEFAULT_LOSS,
    time_optimizer: Annotated[bool, typer.Option(help="Count AdamW's step too.")] = True,
    dtype: Annotated[str, DTYPE] = DEFAULT_DTYPE,
    bf16: Annotated[bool | None, BF16] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for bench.json and bench.png.", show_default="none")
    ] = None,
    json_: Annotated[bool, JSON] = False,
) -> None:
    """Time a training step of your model on your data in each mode, beside the speed-up that the FLOPs allow.

    The step's prompts are spread evenly over the data.

    The modes take turns in one process. A mode whose loss is not that of `packed` is reported, not timed.

    Example: kvpref bench ./llama pairs.jsonl --batch-size 32 --max-tokens 8192 --output bench
    """
    wanted = _parse_modes(modes)
    check_counts(batch_size=batch_size, max_tokens=max_tokens, repeats=repeats)
    given = GivenData.of(data, split=split, column=column, group_by=group_by, weights=data_weights)
    if output is not None:
        check_writable(output / "bench.json")
    from kvpref.cli.step_inputs import cut_micro_batches, load_model_and_sample
    from kvpref.losses import make_loss
    from kvpref.profiling.precision import compute_dtype, use_autocast

    loss_fn = make_loss(loss)
    loaded, dataset = load_model_and_sample(model, given, tokenizer, dtype, loss_fn, batch_size)
    use_autocast(loaded, bf16)
    cuts: dict[str, Cut] = {mode: cut_micro_batches(dataset, mode, max_tokens) for mode in wanted}
    comparison = _measure(loaded, cuts, loss_fn, time_optimizer, repeats)
    report = _make_report(
        comparison,
        title=f"{model} on {len(dataset)} groups of {given}",
        settings={
            "model": model,
            "data": given.setting,
            "dtype": str(next(loaded.parameters()).dtype),
            "compute_dtype": str(compute_dtype(loaded)),
            "num_groups": len(dataset),
            "max_tokens_per_micro_batch": max_tokens,
            "loss": loss,
            "optimizer": "AdamW" if time_optimizer else None,
        },
        model=loaded,
    )
    _show(report, output)
    if json_:
        print(json.dumps(report.to_json()))
    if comparison.different:
        raise RunError(f"modes that do not compute what packed does were not timed: {', '.join(comparison.different)}")


def _parse_modes(modes: str) -> list[str]:
    from kvpref.plan.modes import MODES
    from kvpref.profiling.steps import BASELINE_MODE

    names = [name.strip() for name in modes.split(",") if name.strip()]
    unknown = [name for name in names if name not in MODES]
    if unknown or not names:
        raise InputError(f"unknown mode {', '.join(unknown) or modes!r}; choose from: {', '.join(MODES)}")
    return list(dict.fromkeys([*names, BASELINE_MODE]))


def _measure(
    model: nn.Module, cuts: dict[str, Cut], loss: PreferenceLoss, use_optimizer: bool, repeats: int
) -> ModeComparison:
    import torch

    from kvpref.profiling.compare.modes import compare_modes
    from kvpref.profiling.timing import TimingOptions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if use_optimizer else None
    try:
        return compare_modes(
            model,
            cuts,
            loss,
            optimizer=optimizer,
            options=TimingOptions(num_rounds=repeats),
            on_start=lambda mode: print(f"checking {mode}", file=sys.stderr),
        )
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of device memory: {error}; lower --max-tokens or leave a mode out of --modes") from error


def _make_report(comparison: ModeComparison, *, title: str, settings: dict[str, Any], model: nn.Module) -> Report:
    from kvpref.profiling.compare.comparison import Comparison
    from kvpref.profiling.compare.report import Report
    from kvpref.profiling.provenance import Provenance
    from kvpref.profiling.steps import BASELINE_MODE

    outcomes = {mode: outcome._asdict() for mode, outcome in comparison.outcomes.items()}
    return Report(
        title=title,
        provenance=Provenance.collect(next(model.parameters()).device),
        settings={**settings, "outcomes": outcomes},
        comparisons=(Comparison(name="step", baseline=BASELINE_MODE, results=comparison.results),),
        skipped=comparison.different,
    )


def _show(report: Report, output: Path | None) -> None:
    from rich.console import Console

    from kvpref.profiling.compare.plot import draw
    from kvpref.profiling.compare.report import comparison_table

    console = Console()
    console.print(comparison_table(report, extra=_columns()))
    for mode, reason in report.skipped.items():
        console.print(f"{mode} was not timed: {reason}", markup=False, highlight=False, soft_wrap=True)
    if output is None:
        return
    report.write(output / "bench.json")
    picture = " and bench.png" if draw(report, output / "bench.png") else '; bench.png needs pip install "kvpref[plot]"'
    print(f"wrote {output / 'bench.json'}{picture}", file=sys.stderr)


def _columns() -> list[Column]:
    from kvpref.profiling.compare.report import Column

    def rate(fact: str) -> Any:
        return lambda result: f"{result.facts[fact] / result.time_ms.median * 1000:.0f}"

    def peak(result: CaseResult) -> str:
        assert result.peak_bytes is not None
        return f"{result.peak_bytes / 2**20:.0f} MiB"

    return [
        Column("unique tokens/s", rate("unique_tokens")),
        Column("tokens/s", rate("total_tokens")),
        Column("peak memory", peak),
    ]
