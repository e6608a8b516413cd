"""The trainer's arguments for a run, from its settings and the defaults of `kvpref train`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvpref.cli.run_config import RunConfig
from kvpref.errors import InputError
from kvpref.training import PreferenceTrainingArguments

# What a user of this command expects where transformers' own default differs.
DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "max_tokens_per_micro_batch": 16384,
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
}


def with_defaults(run: RunConfig) -> RunConfig:
    """`run` with every default of this command written out, so that its file repeats the run in later versions too."""
    training = {**DEFAULTS, **run.training}
    if training.get("eval_steps") is not None:
        training.setdefault("eval_strategy", "steps")
    return replace(run, training=training)


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
