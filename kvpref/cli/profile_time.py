"""`kvpref profile time`."""

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
    DEFAULT_MODE,
    DEFAULT_SCHEDULE,
    DTYPE,
    GROUP_BY,
    JSON,
    LOSS,
    MAX_TOKENS,
    MAX_TOKENS_PER_CHUNK,
    MODE,
    MODEL_OR_CONFIG,
    SCHEDULE,
    SPLIT,
    TOKENIZER,
    check_counts,
)
from kvpref.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpref.engine.options import EngineOptions
    from kvpref.losses import PreferenceLoss
    from kvpref.profiling.step_time.report import TimeReport
    from kvpref.records.groups import Group


def time(
    model: Annotated[str, MODEL_OR_CONFIG],
    data: Annotated[list[str], DATA],
    tokenizer: Annotated[str | None, TOKENIZER] = None,
    split: Annotated[str | None, SPLIT] = None,
    column: Annotated[list[str] | None, COLUMN] = None,
    group_by: Annotated[str | None, GROUP_BY] = None,
    data_weights: Annotated[str | None, DATA_WEIGHTS] = None,
    mode: Annotated[str, MODE] = DEFAULT_MODE,
    schedule: Annotated[str, SCHEDULE] = DEFAULT_SCHEDULE,
    max_tokens_per_chunk: Annotated[int | None, MAX_TOKENS_PER_CHUNK] = None,
    batch_size: Annotated[int, BATCH_SIZE] = DEFAULT_BATCH_SIZE,
    max_tokens: Annotated[int | None, MAX_TOKENS] = None,
    steps: Annotated[int, typer.Option(help="Steps to profile; times are means over them.")] = 3,
    loss: Annotated[str, LOSS] = DEFAULT_LOSS,
    dtype: Annotated[str, DTYPE] = DEFAULT_DTYPE,
    bf16: Annotated[bool | None, BF16] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for time.json and trace.json (a Chrome trace).", show_default="none")
    ] = None,
    json_: Annotated[bool, JSON] = False,
) -> None:
    """Show where the time of a training step (data, forward, backward, AdamW) goes, pass by pass.

    The step's prompts are spread evenly over the data.

    Times are those of the profiler, which slows short operations down: read them as shares. On CUDA they are those of
    kernels, without the gaps between them. trace.json opens in ui.perfetto.dev.

    Example: kvpref profile time ./llama pairs.jsonl --batch-size 32 --output time
    """
    given = GivenData.of(data, split=split, column=column, group_by=group_by, weights=data_weights)
    check_counts(batch_size=batch_size, max_tokens=max_tokens, steps=steps)
    if output is not None:
        check_writable(output / "time.json")
    from kvpref.cli.step_inputs import cut_micro_batches, load_model_and_sample
    from kvpref.engine.options import EngineOptions
    from kvpref.losses import make_loss
    from kvpref.profiling.precision import compute_dtype, use_autocast

    options = EngineOptions(mode=mode, schedule=schedule, max_tokens_per_chunk=max_tokens_per_chunk)
    loss_fn = make_loss(loss)
    loaded, sampled = load_model_and_sample(model, given, tokenizer, dtype, loss_fn, batch_size)
    use_autocast(loaded, bf16)
    cut = cut_micro_batches(sampled, mode, max_tokens)
    settings = {
        "model": model,
        "data": given.setting,
        "dtype": str(next(loaded.parameters()).dtype),
        "compute_dtype": str(compute_dtype(loaded)),
        "mode": mode,
        "schedule": schedule,
        "max_tokens_per_chunk": options.chunk_tokens,
        "max_tokens_per_micro_batch": max_tokens,
        "loss": loss,
        "optimizer": "AdamW",
    }
    title = f"{Path(model).name} on {len(sampled)} groups of {given.title}, {mode}, {schedule}"
    report = _measure(loaded, cut, loss_fn, options, steps, output, title=title, settings=settings)
    _show(report, output)
    if json_:
        print(json.dumps(report.to_json()))


def _measure(
    model: PreTrainedModel,
    cut: list[list[Group]],
    loss: PreferenceLoss,
    options: EngineOptions,
    num_steps: int,
    output: Path | None,
    *,
    title: str,
    settings: dict[str, Any],
) -> TimeReport:
    import torch

    from kvpref.profiling.provenance import Provenance
    from kvpref.profiling.step_time.report import TimeReport
    from kvpref.profiling.step_time.step import TimedStep, profile_time

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    print(f"profiling {num_steps} step{'s' if num_steps > 1 else ''}", file=sys.stderr)
    try:
        step = TimedStep(model, loss, optimizer, cut, options)
        profile = profile_time(step, num_steps, None if output is None else output / "trace.json")
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of device memory: {error}; lower --max-tokens, or take --schedule bounded") from error
    return TimeReport(
        title=title, provenance=Provenance.collect(device), settings=settings, facts=step.facts, profile=profile
    )


def _show(report: TimeReport, output: Path | None) -> None:
    from rich.console import Console

    from kvpref.profiling.step_time.report import time_table

    Console().print(time_table(report))
    if output is not None:
        report.write(output / "time.json")
        print(f"wrote time.json and trace.json to {output}", file=sys.stderr)
