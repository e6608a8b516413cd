"""`kvpref train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvpref.cli.ctrl_c import NOTHING_SAVED, ctrl_c_says
from kvpref.cli.given_settings import from_assignments, from_file, from_options, merge
from kvpref.cli.options import (
    BATCH_SIZE,
    BF16,
    CHECKPOINT,
    CONFIG,
    DATA,
    DATA_PANEL,
    DTYPE,
    FREEZE_VISION,
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
    ON_BAD_ROW,
    PREFIX_CACHE,
    SAVING_PANEL,
    SCHEDULE,
    TOKENIZER,
    TRAINING_PANEL,
)
from kvpref.errors import InputError


def train(
    model: Annotated[str | None, MODEL] = None,
    data: Annotated[str | None, DATA] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Folder for checkpoints and the model.", show_default="none: here or in --config-file"),
    ] = None,
    config_file: Annotated[
        str | None, typer.Option(help="YAML with any of these settings; options win.", show_default="none")
    ] = None,
    config: Annotated[str | None, CONFIG] = None,
    tokenizer: Annotated[str | None, TOKENIZER] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    lora_r: Annotated[int | None, LORA_R] = None,
    lora_alpha: Annotated[float | None, LORA_ALPHA] = None,
    lora_target_modules: Annotated[str | None, LORA_TARGET_MODULES] = None,
    freeze_vision: Annotated[bool | None, FREEZE_VISION] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Evaluation data.", show_default="none", rich_help_panel=DATA_PANEL)
    ] = None,
    max_prompt_tokens: Annotated[int | None, MAX_PROMPT_TOKENS] = None,
    max_response_tokens: Annotated[int | None, MAX_RESPONSE_TOKENS] = None,
    max_image_pixels: Annotated[int | None, MAX_IMAGE_PIXELS] = None,
    on_bad_row: Annotated[str | None, ON_BAD_ROW] = None,
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
    eval_steps: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations.", show_default="none: at the end", rich_help_panel=SAVING_PANEL),
    ] = None,
    save_steps: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints.", show_default="200", rich_help_panel=SAVING_PANEL),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint, with the settings in OUTPUT/run.yaml.",
            rich_help_panel=SAVING_PANEL,
        ),
    ] = False,
    json_: Annotated[bool, JSON] = False,
) -> None:
    """Train a model on preference data, each shared prompt encoded once.

    MODEL may be the folder of a PEFT adapter, which is then trained further. Losses that read rewards (bradley_terry,
    ...) train a reward model: MODEL with a scalar head. Columns of the data that the loss declares are read along.

    With --resume alone a run goes on as it was; options that change its results are refused, others are taken.

    Example: kvpref train ./llama pairs.jsonl --output out --loss dpo --loss-arg beta=0.1 --max-tokens 8192
    """
    if config is not None and model is not None and data is None:
        model, data = None, model  # with --config the only positional argument is the data
    chosen = from_options(
        {
            "model": model,
            "config": config,
            "tokenizer": tokenizer,
            "data": data,
            "eval_data": eval_data,
            "output": output,
            "dtype": dtype,
            "max_prompt_tokens": max_prompt_tokens,
            "max_response_tokens": max_response_tokens,
            "max_image_pixels": max_image_pixels,
            "on_bad_row": on_bad_row,
            "lora_r": lora_r,
            "lora_alpha": lora_alpha,
            "lora_target_modules": lora_target_modules,
            "freeze_vision": freeze_vision,
            "loss": loss,
            "mode": mode,
            "num_train_epochs": epochs,
            "max_steps": max_steps,
            "per_device_train_batch_size": batch_size,
            "max_tokens_per_micro_batch": max_tokens,
            "learning_rate": learning_rate,
            "seed": seed,
            "bf16": bf16,
            "schedule": schedule,
            "max_tokens_per_chunk": max_tokens_per_chunk,
            "auto_budget": auto_budget,
            "prefix_cache": prefix_cache,
            "checkpoint": checkpoint,
            "gradient_checkpointing": gradient_checkpointing,
            "logging_steps": logging_steps,
            "eval_steps": eval_steps,
            "save_steps": save_steps,
        },
        loss_arg or [],
    )
    file = {} if config_file is None else from_file(Path(config_file))
    given = merge(file, chosen, from_assignments(set_ or []))
    for name in ("output",) if resume else ("data", "output"):
        if name not in given:
            raise InputError(f"{name} is missing; give it on the command line or in --config-file")
    with ctrl_c_says(NOTHING_SAVED):
        from kvpref.cli.training_run import run_training

    result = run_training(given, resume=resume, report=lambda line: print(line, file=sys.stderr))
    if json_ and result:
        print(json.dumps(result))
