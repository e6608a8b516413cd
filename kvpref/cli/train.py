"""`kvpref train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvpref.cli.ctrl_c import NOTHING_SAVED, ctrl_c_says
from kvpref.cli.given_data import parse_columns, parse_weights
from kvpref.cli.given_settings import Settings, from_assignments, from_file, from_options, merge, place_positions
from kvpref.cli.name_checks import check_names
from kvpref.cli.named_sources import check_sources
from kvpref.cli.options import (
    ACCELERATE_CONFIG,
    BATCH_SIZE,
    BF16,
    CHECKPOINT,
    COLUMN,
    DATA,
    DATA_PANEL,
    DATA_WEIGHTS,
    DATASET_NAME,
    DEFAULT_LOSS,
    DTYPE,
    FREEZE_VISION,
    GROUP_BY,
    JSON,
    LORA_ALPHA,
    LORA_R,
    LORA_TARGET_MODULES,
    LOSS,
    MAX_IMAGE_PIXELS,
    MAX_PROMPT_TOKENS,
    MAX_RESPONSE_TOKENS,
    MAX_TOKENS,
    MAX_TOKENS_PER_CHUNK,
    MEMORY_PANEL,
    MODE,
    MODEL,
    MODEL_CONFIG,
    MODEL_NAME_OR_PATH,
    NUM_PROCESSES,
    ON_BAD_ROW,
    PREFIX_CACHE,
    SAVING_PANEL,
    SCHEDULE,
    SEQUENCE_PARALLEL,
    SPLIT,
    TOKENIZER,
    TRAINING_PANEL,
    TRAJECTORY_GROUPS,
)
from kvpref.cli.output_folder import check_output
from kvpref.cli.precision import check_precision
from kvpref.cli.run_config import sources_of
from kvpref.cli.setting_values import check_values
from kvpref.cli.starting_ranks import end_with_starter, ranks_to_start, start_ranks, without_number
from kvpref.errors import InputError

NO_SETTINGS = frozenset(
    {
        "model_name_or_path",
        "dataset_name",
        "config",
        "loss_arg",
        "column",
        "set_",
        "resume",
        "overwrite",
        "num_processes",
        "json_",
    }
)
"""The parameters of `train` that are no settings of the run. All others are handed on as they were given."""


def train(
    context: typer.Context,
    model: Annotated[str | None, MODEL] = None,
    data: Annotated[list[str] | None, DATA] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Folder for checkpoints and the model.", show_default="none: here or in --config"),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="YAML with any of these settings, such as a run.yaml; options win.", show_default="none"),
    ] = None,
    model_name_or_path: Annotated[str | None, MODEL_NAME_OR_PATH] = None,
    model_config: Annotated[str | None, MODEL_CONFIG] = None,
    tokenizer: Annotated[str | None, TOKENIZER] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    lora_r: Annotated[int | None, LORA_R] = None,
    lora_alpha: Annotated[float | None, LORA_ALPHA] = None,
    lora_target_modules: Annotated[str | None, LORA_TARGET_MODULES] = None,
    freeze_vision: Annotated[bool | None, FREEZE_VISION] = None,
    split: Annotated[str | None, SPLIT] = None,
    column: Annotated[list[str] | None, COLUMN] = None,
    group_by: Annotated[str | None, GROUP_BY] = None,
    data_weights: Annotated[str | None, DATA_WEIGHTS] = None,
    dataset_name: Annotated[str | None, DATASET_NAME] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Evaluation data.", show_default="none", rich_help_panel=DATA_PANEL)
    ] = None,
    max_prompt_tokens: Annotated[int | None, MAX_PROMPT_TOKENS] = None,
    max_response_tokens: Annotated[int | None, MAX_RESPONSE_TOKENS] = None,
    max_image_pixels: Annotated[int | None, MAX_IMAGE_PIXELS] = None,
    on_bad_row: Annotated[str | None, ON_BAD_ROW] = None,
    trajectory_groups: Annotated[str | None, TRAJECTORY_GROUPS] = None,
    loss: Annotated[str | None, LOSS] = None,
    loss_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Setting of the loss, such as beta=0.2.",
            show_default="those of kvpref losses NAME",
            rich_help_panel=TRAINING_PANEL,
        ),
    ] = None,
    mode: Annotated[str | None, MODE] = None,
    fsdp: Annotated[
        bool | None,
        typer.Option(
            "--fsdp",
            help="Shard weights, gradients and optimizer state over all processes (FSDP2).",
            show_default="off",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Times over the data.", show_default="1", rich_help_panel=TRAINING_PANEL)
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps.", show_default="those of --epochs", rich_help_panel=TRAINING_PANEL),
    ] = None,
    batch_size: Annotated[int | None, BATCH_SIZE] = None,
    max_tokens: Annotated[int | None, MAX_TOKENS] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Its peak.", show_default="by loss, see kvpref losses NAME", rich_help_panel=TRAINING_PANEL),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of random weights and the order of the data.", show_default="42", rich_help_panel=TRAINING_PANEL
        ),
    ] = None,
    bf16: Annotated[bool | None, BF16] = None,
    schedule: Annotated[str | None, SCHEDULE] = None,
    max_tokens_per_chunk: Annotated[int | None, MAX_TOKENS_PER_CHUNK] = None,
    auto_budget: Annotated[
        bool | None,
        typer.Option(
            "--auto-budget",
            help="bounded: out of memory, halve the chunk and go on.",
            show_default="off",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = None,
    prefix_cache: Annotated[str | None, PREFIX_CACHE] = None,
    checkpoint: Annotated[str | None, CHECKPOINT] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing",
            help="As --checkpoint all.",
            show_default="off",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = None,
    sequence_parallel: Annotated[int | None, SEQUENCE_PARALLEL] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any training argument, NAME=VALUE.",
            show_default="kvpref.PreferenceTrainingArguments'",
            rich_help_panel=TRAINING_PANEL,
        ),
    ] = None,
    logging_steps: Annotated[
        int | None, typer.Option(help="Steps between log lines.", show_default="10", rich_help_panel=SAVING_PANEL)
    ] = None,
    early_stopping_patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many evaluations without a better one, and keep the best model.",
            show_default="none",
            rich_help_panel=TRAINING_PANEL,
        ),
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations.", show_default="none: at the end", rich_help_panel=SAVING_PANEL),
    ] = None,
    save_steps: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints.", show_default="200", rich_help_panel=SAVING_PANEL),
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option(
            help="Where metrics also go: tensorboard, wandb, trackio, or several, separated by commas.",
            show_default="none",
            rich_help_panel=SAVING_PANEL,
        ),
    ] = None,
    push_to_hub: Annotated[
        bool | None,
        typer.Option(
            "--push-to-hub",
            help="Upload the final model with its card to the Hugging Face Hub.",
            show_default="off",
            rich_help_panel=SAVING_PANEL,
        ),
    ] = None,
    hub_model_id: Annotated[
        str | None,
        typer.Option(
            help="Repository to push to, such as ORGANISATION/NAME.",
            show_default="the name of --output, under your account",
            rich_help_panel=SAVING_PANEL,
        ),
    ] = None,
    hub_private_repo: Annotated[
        bool | None,
        typer.Option(
            "--hub-private-repo",
            help="Make the repository private, where it is made.",
            show_default="your account's default",
            rich_help_panel=SAVING_PANEL,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint, with the settings in OUTPUT/run.yaml.",
            rich_help_panel=SAVING_PANEL,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the earlier run in OUTPUT.", rich_help_panel=SAVING_PANEL),
    ] = False,
    num_processes: Annotated[int | None, NUM_PROCESSES] = None,
    accelerate_config: Annotated[str | None, ACCELERATE_CONFIG] = None,
    json_: Annotated[bool, JSON] = False,
) -> None:
    """Train a model on preference data, each shared prompt encoded once.

    MODEL may be the folder of a PEFT adapter, which is then trained further. Losses that read rewards (bradley_terry,
    ...) train a reward model: MODEL with a scalar head. Columns of the data that the loss declares are read along.

    With --resume alone a run goes on as it was; options that change its results are refused, others are taken.

    Example: kvpref train ./llama pairs.jsonl --output out --loss dpo --loss-arg beta=0.1 --max-tokens 8192
    """
    if resume and overwrite:
        raise InputError("--resume goes on with the run in OUTPUT, --overwrite deletes it; leave one of them out")
    model, sources = place_positions(
        [*filter(None, [model]), *(data or [])],
        model=model_name_or_path,
        dataset=dataset_name,
        model_config=model_config,
    )
    options = context.params | {
        "model": model,
        "data": sources or None,
        "column_names": parse_columns(column) if column else None,
        "data_weights": None if data_weights is None else list(parse_weights(data_weights)),
        "fsdp": "full_shard" if fsdp else None,
        "report_to": None if report_to is None else [name.strip() for name in report_to.split(",")],
    }
    chosen = from_options({name: value for name, value in options.items() if name not in NO_SETTINGS}, loss_arg or [])
    file = {} if config is None else from_file(Path(config))
    given = merge(file, chosen, from_assignments(set_ or []))
    known = _known_loss(given, resume=resume)
    check_names(given, loss=known)
    check_values(given, loss=known)
    check_precision(given)
    values = {name: item.value for name, item in given.items()}
    check_sources(values)
    for name in ("output",) if resume else ("data", "output"):
        if name not in given:
            raise InputError(f"{name} is missing; give it on the command line or in --config")
    # --overwrite is for a run's folder, its run.yaml included.
    read = sources_of(values) if config is None or overwrite else [*sources_of(values), config]
    check_output(Path(str(given["output"].value)), read, resume=resume, overwrite=overwrite)
    number = ranks_to_start(num_processes, given.get("accelerate_config"))
    if number > 1:
        raise typer.Exit(start_ranks(number, without_number(sys.argv[1:]), Path(str(given["output"].value))))
    end_with_starter()
    with ctrl_c_says(NOTHING_SAVED):
        from kvpref.cli.training_run import run_training

    result = run_training(given, resume=resume, overwrite=overwrite, report=lambda line: print(line, file=sys.stderr))
    if json_ and result:
        print(json.dumps(result))


def _known_loss(given: Settings, *, resume: bool) -> str | None:
    """The loss of the run; None where only the run that is resumed knows."""
    if "loss" in given:
        return str(given["loss"].value)
    return None if resume else DEFAULT_LOSS
