"""The trainer's arguments for a run, from its settings and the defaults of `kvpref train`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from kvpref.cli.early_stopping import with_early_stopping
from kvpref.cli.run_config import RunConfig
from kvpref.errors import InputError
from kvpref.training import PreferenceTrainingArguments

# What a user of this command expects where transformers' own default differs, and the defaults that results depend on.
DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
    **{
        item.name: item.default
        for item in fields(PreferenceTrainingArguments)
        if item.name in ("num_train_epochs", "lr_scheduler_type", "warmup_steps")
    },
}

CHOSEN = ("learning_rate", "bf16", "max_tokens_per_micro_batch")
"""Training arguments whose defaults depend on the loss, the model, the data and the device."""


def with_defaults(run: RunConfig) -> RunConfig:
    """`run` with every default of this command written out, so that its file repeats the run in later versions too."""
    run = with_early_stopping(run)
    training = {**DEFAULTS, **run.training}
    if training.get("eval_steps") is not None:
        training.setdefault("eval_strategy", "steps")
    if run.dtype in ("bfloat16", "float16"):
        training.setdefault("bf16", False)  # there is nothing to cast
    return replace(run, training=training)


def with_chosen(run: RunConfig, args: PreferenceTrainingArguments) -> RunConfig:
    """`run` with what a trainer chose where nothing was given, so that going on with it does not choose again.

    Args:
        run: With the command's defaults.
        args: The trainer's own.
    """
    return replace(run, training={**run.training, **{name: getattr(args, name) for name in CHOSEN}})


def training_arguments(run: RunConfig) -> PreferenceTrainingArguments:
    """The trainer's arguments for a run.

    Raises:
        InputError: If settings do not fit one another, or the machine.
    """
    try:
        return PreferenceTrainingArguments(**{**run.training, "output_dir": run.output})
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        raise InputError(f"training arguments: {' '.join(str(error).split())}") from error
