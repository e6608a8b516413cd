"""``kvpref data inspect``: what a dataset holds, what sharing prompts can save, and what a token budget gives."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpref.cli import data_tree
from kvpref.cli.checked_command import CheckedCommand
from kvpref.cli.data_report import print_batches, print_data, print_prediction
from kvpref.cli.given_data import GivenData
from kvpref.cli.options import (
    BATCH_SIZE,
    BF16,
    COLUMN,
    DATA,
    DATA_WEIGHTS,
    DEFAULT_BATCH_SIZE,
    DEFAULT_DTYPE,
    DTYPE,
    GROUP_BY,
    JSON,
    MAX_IMAGE_PIXELS,
    MAX_PROMPT_TOKENS,
    MAX_RESPONSE_TOKENS,
    MAX_TOKENS,
    MODE,
    MODEL_PANEL,
    ON_BAD_ROW,
    SPLIT,
    TRAJECTORY_GROUPS,
    check_counts,
)
from kvpref.data.batching.costs import Mode
from kvpref.data.dataset import OnBadRow
from kvpref.data.reading.trajectories.attempts import TrajectoryGroups

if TYPE_CHECKING:
    from rich.console import Console

    from kvpref.data import PreferenceDataset, StepOptions
    from kvpref.plan.flops import ModelShape
    from kvpref.profiling.calibration import Calibration

MAX_TOKENS_MEASURED = {"cpu": 1024, "cuda": 16384}

app = typer.Typer(no_args_is_help=True, help="Look at preference data.")


@app.callback()
def callback() -> None:
    """Look at preference data."""


app.command(
    "tree",
    cls=CheckedCommand,
    no_args_is_help=True,
    epilog="Example: kvpref data tree trajectories.jsonl --tokenizer Qwen/Qwen3-0.6B --id airline-3 --output tree.svg",
)(data_tree.tree)


@app.command(
    cls=CheckedCommand,
    no_args_is_help=True,
    epilog="Example: kvpref data inspect pairs.jsonl --tokenizer gpt2 --max-tokens 8192",
)
def inspect(
    data: Annotated[list[str], DATA],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name.", rich_help_panel=MODEL_PANEL)],
    split: Annotated[str | None, SPLIT] = None,
    column: Annotated[list[str] | None, COLUMN] = None,
    group_by: Annotated[str | None, GROUP_BY] = None,
    data_weights: Annotated[str | None, DATA_WEIGHTS] = None,
    max_prompt_tokens: Annotated[int | None, MAX_PROMPT_TOKENS] = None,
    max_response_tokens: Annotated[int | None, MAX_RESPONSE_TOKENS] = None,
    max_image_pixels: Annotated[int | None, MAX_IMAGE_PIXELS] = None,
    on_bad_row: Annotated[OnBadRow, ON_BAD_ROW] = "stop",
    trajectory_groups: Annotated[TrajectoryGroups, TRAJECTORY_GROUPS] = "task",
    max_tokens: Annotated[int | None, MAX_TOKENS] = None,
    batch_size: Annotated[int, BATCH_SIZE] = DEFAULT_BATCH_SIZE,
    mode: Annotated[Mode, MODE] = "two_pass",
    world_size: Annotated[int, typer.Option(help="Devices to plan for.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(
            help="Predict the time of a step: measures this model (folder, hub name or config.json) here.",
            show_default="none",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    dtype: Annotated[str, DTYPE] = DEFAULT_DTYPE,
    bf16: Annotated[bool | None, BF16] = None,
    json_: Annotated[bool, JSON] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write bad rows to this file, one JSON object each.", show_default="none")
    ] = None,
) -> None:
    """Print lengths, what shared prompts save, bad rows, truncation, and the batches of a budget."""
    from rich.console import Console

    from kvpref.data import DataOptions, StepOptions, load_processor, summarize_dataset

    given = GivenData.of(data, split=split, column=column, group_by=group_by, weights=data_weights)
    # Options are checked before minutes go into reading.
    options = DataOptions(
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        max_image_pixels=max_image_pixels,
        on_bad_row=on_bad_row,
        trajectory_groups=trajectory_groups,
    )
    check_counts(batch_size=batch_size, max_tokens=max_tokens, world_size=world_size)
    step_options = StepOptions(
        groups_per_step=batch_size * world_size,
        max_tokens_per_micro_batch=max_tokens,
        mode=mode,
        world_size=world_size,
        takes_larger_groups=True,  # which the report counts
    )
    with Console(stderr=True).status(f"reading {given}"):
        dataset = given.load(load_processor(tokenizer), options)
        statistics = summarize_dataset(dataset)
    assert dataset.report is not None
    if report is not None:
        dataset.report.write_bad_rows(report)
    console = Console()
    print_data(console, dataset.report, statistics)
    batches = _inspect_batches(console, dataset, step_options, model, (dtype, bf16))
    if json_:
        result = {"data": asdict(statistics), **batches, "report": asdict(dataset.report)}
        print(json.dumps(result | {"fingerprint": dataset.fingerprint}))


def _inspect_batches(
    console: Console,
    dataset: PreferenceDataset,
    options: StepOptions,
    model: str | None,
    precision: tuple[str, bool | None],
) -> dict[str, Any]:
    """Print and return what micro-batches there are, and with a model how long they take."""
    from kvpref.data import CostModel, StepBatcher, summarize_batches
    from kvpref.data.batching.budgets import default_budget
    from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS

    lengths = dataset.batching_lengths(DEFAULT_MIN_SHARED_TOKENS)
    if options.max_tokens_per_micro_batch is None:
        options = replace(options, max_tokens_per_micro_batch=default_budget(lengths, options.mode))
    clusters = dataset.clusters(options.groups_per_step, DEFAULT_MIN_SHARED_TOKENS)
    batcher = StepBatcher(lengths, options, dataset.group_ids, clusters=clusters)
    if model is None:
        batches = summarize_batches(batcher)
        print_batches(console, batches)
        return {"batches": asdict(batches)}
    shape, calibration = _measure(model, precision, options)
    # Steps are planned as training plans them, by FLOPs; seconds only say what they take on this device.
    batcher = StepBatcher(lengths, options, dataset.group_ids, CostModel.from_shape(shape, options.mode), clusters)
    batches = summarize_batches(batcher, calibration.cost_model)
    prediction = {
        "device": calibration.device,
        "seconds_per_step": batches.costliest_rank_per_step,
        "seconds_per_step_in_lockstep": batches.costliest_micro_batches_per_step,
        "seconds_per_epoch": batches.costliest_rank_per_step * batches.num_steps,
        "fit_error": calibration.relative_error,
        "cost_model": asdict(calibration.cost_model),
    }
    print_batches(console, batches)
    print_prediction(console, batches, calibration)
    return {"batches": asdict(batches), "prediction": prediction}


def _measure(model: str, precision: tuple[str, bool | None], options: StepOptions) -> tuple[ModelShape, Calibration]:
    """Load a model and time it on the device at hand."""
    import torch
    from rich.console import Console

    from kvpref.cli.loading import load_model
    from kvpref.models.attach import attach
    from kvpref.models.shape import model_shape
    from kvpref.profiling.calibration import MIN_TOKENS, calibrate
    from kvpref.profiling.precision import use_autocast

    # Time does not depend on the weights' values, so a configuration will do.
    source = (None, model) if model.endswith(".json") else (model, None)
    dtype, bf16 = precision
    loaded = attach(load_model(*source, dtype=dtype))
    use_autocast(loaded, bf16)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(loaded, device)
    # Larger micro-batches say more about a GPU, which small ones do not fill, and take minutes on a CPU.
    most = MAX_TOKENS_MEASURED[device.type]
    max_tokens = max(MIN_TOKENS, min(options.max_tokens_per_micro_batch or most, most))
    with Console(stderr=True).status(f"measuring {model} in mode {options.mode} on {device}"):
        return model_shape(loaded), calibrate(loaded, mode=options.mode, max_tokens=max_tokens)
