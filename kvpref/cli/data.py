"""``kvpref data inspect``: what a dataset holds, what sharing prompts can save, and what a token budget gives."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpref.cli.options import (
    BATCH_SIZE,
    BF16,
    DEFAULT_BATCH_SIZE,
    DEFAULT_DTYPE,
    DTYPE,
    JSON,
    MAX_IMAGE_PIXELS,
    MAX_PROMPT_TOKENS,
    MAX_RESPONSE_TOKENS,
    MAX_TOKENS,
    MODE,
    MODEL_PANEL,
    ON_BAD_ROW,
    check_counts,
)
from kvpref.data.batching.costs import Mode
from kvpref.data.dataset import OnBadRow

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvpref.data import (
        BatchStatistics,
        DataReport,
        DataStatistics,
        ImageStatistics,
        PreferenceDataset,
        StepOptions,
    )
    from kvpref.plan.flops import ModelShape
    from kvpref.profiling.calibration import Calibration

MAX_BAD_ROWS_SHOWN = 10
MAX_TOKENS_MEASURED = {"cpu": 1024, "cuda": 16384}

app = typer.Typer(no_args_is_help=True, help="Look at preference data.")


@app.callback()
def data() -> None:
    """Look at preference data."""


@app.command(
    no_args_is_help=True,
    epilog="Example: kvpref data inspect pairs.jsonl --tokenizer gpt2 --max-tokens 8192",
)
def inspect(
    source: Annotated[
        str,
        typer.Argument(metavar="DATA", help="A .jsonl, .json or .parquet file, or a dataset name, also NAME:SPLIT."),
    ],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name.", rich_help_panel=MODEL_PANEL)],
    max_prompt_tokens: Annotated[int | None, MAX_PROMPT_TOKENS] = None,
    max_response_tokens: Annotated[int | None, MAX_RESPONSE_TOKENS] = None,
    max_image_pixels: Annotated[int | None, MAX_IMAGE_PIXELS] = None,
    on_bad_row: Annotated[OnBadRow, ON_BAD_ROW] = "stop",
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

    from kvpref.data import DataOptions, StepOptions, load_preferences, load_processor, summarize_dataset

    # Options are checked before minutes go into reading.
    options = DataOptions(
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        max_image_pixels=max_image_pixels,
        on_bad_row=on_bad_row,
    )
    check_counts(batch_size=batch_size, max_tokens=max_tokens, world_size=world_size)
    step_options = StepOptions(
        groups_per_step=batch_size * world_size,
        max_tokens_per_micro_batch=max_tokens,
        mode=mode,
        world_size=world_size,
    )
    with Console(stderr=True).status(f"reading {source}"):
        dataset = load_preferences(source, load_processor(tokenizer), options)
        statistics = summarize_dataset(dataset)
    assert dataset.report is not None
    if report is not None:
        dataset.report.write_bad_rows(report)
    # Printed before planning: a budget that is too small for a group should not cost the user these figures.
    console = Console()
    _print_data(console, dataset.report, statistics)
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
    from kvpref.plan.batch import DEFAULT_MIN_SHARED_TOKENS

    lengths = dataset.batching_lengths(DEFAULT_MIN_SHARED_TOKENS)
    if options.max_tokens_per_micro_batch is None:
        options = replace(options, max_tokens_per_micro_batch=default_budget(lengths, options.mode))
    clusters = dataset.clusters(options.groups_per_step, DEFAULT_MIN_SHARED_TOKENS)
    # Before a model is loaded: planning refuses a budget that is too small.
    batcher = StepBatcher(lengths, options, dataset.group_ids, clusters=clusters)
    if model is None:
        batches = summarize_batches(batcher)
        _print_batches(console, batches)
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
    _print_batches(console, batches)
    _print_prediction(console, batches, calibration)
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


def _print_data(console: Console, report: DataReport, statistics: DataStatistics) -> None:
    from kvpref.data.statistics import DATA_SAVING

    console.print(_lengths_table(report.source, statistics))
    images = statistics.images
    _print_facts(
        console,
        {
            "groups": f"{statistics.num_groups} of {report.num_rows} rows, {statistics.num_sequences} sequences",
            "prompt share": f"{statistics.prompt_share:.1%} of {statistics.total_tokens} tokens",
            "data saving": f"{statistics.prefix_saving:.2f}x, {DATA_SAVING} "
            f"({statistics.prompt_saving:.2f}x were it prompts only)",
            **({} if images is None else _image_facts(images, report)),
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


def _print_batches(console: Console, batches: BatchStatistics) -> None:
    from kvpref.data.statistics import TOKEN_SAVING

    fill = "" if batches.budget_fill is None else f", budget filled to {batches.budget_fill:.1%}"
    padding = f", {batches.padding_share:.1%} padding" if batches.mode == "padded" else ""
    tokens = batches.tokens_per_micro_batch
    _print_facts(
        console,
        {
            "steps": f"{batches.num_steps} per epoch, {batches.micro_batches_per_step:.2f} micro-batches each",
            "micro-batches": f"{tokens.mean:.0f} tokens on average, at most {tokens.max}, in mode {batches.mode}"
            f"{fill}{padding}",
            "token saving": f"at least {batches.token_saving:.2f}x, {TOKEN_SAVING}",
            "shared prompts": f"{batches.num_sharing_groups} groups begin like others beyond what is common; "
            f"largest cluster: {batches.largest_cluster}",
            "ranks": f"{batches.world_size}, the busiest {batches.imbalance:.1%} above the mean in {batches.cost_unit}",
        },
    )


def _print_prediction(console: Console, batches: BatchStatistics, calibration: Calibration) -> None:
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
    # Both tables of facts line up.
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
    for label, summary in (
        ("prompt, per group", statistics.prompt_tokens),
        *of_images,
        ("response, EOS included", statistics.response_tokens),
        ("sequences per group (N)", statistics.sequences_per_group),
    ):
        table.add_row(label, f"{summary.mean:.1f}", str(summary.p50), str(summary.p90), str(summary.max))
    return table
