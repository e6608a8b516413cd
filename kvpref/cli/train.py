"""`kvpref train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvpref.cli.given_settings import from_assignments, from_file, from_options, merge
from kvpref.errors import InputError

_DATA, _MODEL, _TRAINING, _MEMORY, _SAVING = "Data", "Model", "Training", "Memory", "Saving and logging"


def train(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name; leave out with --config.")] = None,
    data: Annotated[str | None, typer.Argument(help=".jsonl, .json, .parquet or dataset name.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for checkpoints and the model.")] = None,
    config_file: Annotated[str | None, typer.Option(help="YAML with any of these settings; flags win.")] = None,
    config: Annotated[
        str | None, typer.Option(help="JSON model configuration: random weights.", rich_help_panel=_MODEL)
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Default: the model's own.", rich_help_panel=_MODEL)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, auto.", rich_help_panel=_MODEL)] = None,
    lora_r: Annotated[
        int | None, typer.Option(help="Train a LoRA adapter of this rank.", rich_help_panel=_MODEL)
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Default: twice the rank.", rich_help_panel=_MODEL)] = None,
    lora_target_modules: Annotated[
        str | None, typer.Option(help="Such as q_proj,v_proj; default: all linear layers.", rich_help_panel=_MODEL)
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Evaluation data.", rich_help_panel=_DATA)] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Keep the end of longer prompts.", rich_help_panel=_DATA)
    ] = None,
    max_response_tokens: Annotated[
        int | None, typer.Option(help="Keep the start of longer responses.", rich_help_panel=_DATA)
    ] = None,
    on_bad_row: Annotated[str | None, typer.Option(help="stop or skip.", rich_help_panel=_DATA)] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="One of `kvpref losses` (dpo), or yours: FILE.py:FUNCTION.", rich_help_panel=_TRAINING),
    ] = None,
    loss_arg: Annotated[
        list[str] | None, typer.Option(help="Loss setting, such as beta=0.2.", rich_help_panel=_TRAINING)
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="two_pass, one_pass, packed, padded.", rich_help_panel=_TRAINING)
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Default: 3.", rich_help_panel=_TRAINING)] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=_TRAINING)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Groups per device and step.", rich_help_panel=_TRAINING)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Token budget of a micro-batch.", rich_help_panel=_TRAINING)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; default: 5e-5.", rich_help_panel=_TRAINING)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of random weights and the order of the data.", rich_help_panel=_TRAINING)
    ] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16", help="bf16 autocast.", rich_help_panel=_TRAINING)] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="full, or bounded: memory does not grow with the responses.", rich_help_panel=_MEMORY),
    ] = None,
    max_tokens_per_chunk: Annotated[
        int | None,
        typer.Option(help="bounded: most tokens whose activations are held; 8192.", rich_help_panel=_MEMORY),
    ] = None,
    auto_budget: Annotated[
        bool | None,
        typer.Option(
            "--auto-budget", help="bounded: out of memory, halve the chunk and go on.", rich_help_panel=_MEMORY
        ),
    ] = None,
    prefix_cache: Annotated[
        str | None, typer.Option(help="bounded: keys and values on device or cpu.", rich_help_panel=_MEMORY)
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Compute activations again: none, prefix, all.", rich_help_panel=_MEMORY)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="As --checkpoint all.", rich_help_panel=_MEMORY)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any training argument, NAME=VALUE.", rich_help_panel=_TRAINING),
    ] = None,
    logging_steps: Annotated[
        int | None, typer.Option(help="Steps between log lines; default: 10.", rich_help_panel=_SAVING)
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps between evaluations; default: at the end.", rich_help_panel=_SAVING)
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; default: 200.", rich_help_panel=_SAVING)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.", rich_help_panel=_SAVING)
    ] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON object on the last line of stdout.", rich_help_panel=_SAVING)
    ] = False,
) -> None:
    """Train a model on preference data, each shared prompt encoded once.

    MODEL may be the folder of a PEFT adapter, which is then trained further. Losses that read rewards (bradley_terry,
    ...) train a reward model: MODEL with a scalar head. Columns of the data that the loss declares are read along.

    Example: kvpref train ./llama pairs.jsonl --output out --loss dpo --loss-arg beta=0.1 --max-tokens 8192
    """
    if config is not None and model is not None and data is None:
        model, data = None, model  # with --config the only positional argument is the data
    options = from_options(
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
            "on_bad_row": on_bad_row,
            "lora_r": lora_r,
            "lora_alpha": lora_alpha,
            "lora_target_modules": lora_target_modules,
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
    given = merge(file, options, from_assignments(set_ or []))
    for name in ("output",) if resume else ("data", "output"):
        if name not in given:
            raise InputError(f"{name} is missing; give it on the command line or in --config-file")
    from kvpref.cli.training_run import run_training

    result = run_training(given, resume=resume, report=lambda line: print(line, file=sys.stderr))
    if json_ and result:
        print(json.dumps(result))
