"""The trainer's arguments for a run, from its settings and the defaults of `kvpref train`."""

from __future__ import annotations

from dataclasses import fields, replace
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
    return replace(run, training={**DEFAULTS, **run.training})


def training_arguments(run: RunConfig) -> PreferenceTrainingArguments:
    """The trainer's arguments for a run.

    Raises:
        InputError: If there is no such argument, or its value is refused.
    """
    given = {**run.training, "output_dir": run.output}
    valid = {item.name for item in fields(PreferenceTrainingArguments) if item.init}
    unknown = sorted(set(given) - valid)
    if unknown:
        raise InputError(f"there is no training argument {unknown[0]!r}; see PreferenceTrainingArguments")
    try:
        return PreferenceTrainingArguments(**given)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"training arguments: {error}") from error
