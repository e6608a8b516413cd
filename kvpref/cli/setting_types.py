"""What each setting of a training run may be: its declared type and range. Imported only when a run starts."""

from __future__ import annotations

from typing import Any, get_type_hints

from kvpref.cli.choices import read_choice
from kvpref.cli.given_settings import LOSS_ARG, Given, Settings
from kvpref.cli.name_checks import check_setting
from kvpref.cli.run_config import RunConfig
from kvpref.cli.typed_values import read_value
from kvpref.losses import LOSSES
from kvpref.losses.user import find_loss, settings_of
from kvpref.training import PreferenceTrainingArguments

ABOVE_ZERO = frozenset({"num_train_epochs", "logging_steps", "eval_steps", "save_steps", "lora_alpha"})
"""Numbers that must be above 0."""

AT_LEAST_ONE = frozenset(
    {
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "eval_accumulation_steps",
        "save_total_limit",
        "dataloader_prefetch_factor",
        "max_prompt_tokens",
        "max_response_tokens",
        "max_image_pixels",
        "lora_r",
        "early_stopping_patience",
        "max_tokens_per_micro_batch",
        "max_tokens_per_chunk",
        "max_prefix_depth",
        "sequence_parallel",
        "sort_window_steps",
        "reference_sync_steps",
        "torch_empty_cache_steps",
        "min_shared_tokens",
    }
)
"""Counts that must be at least 1. All other numbers must be at least 0, but for those in `MAY_BE_MINUS_ONE`."""

MAY_BE_MINUS_ONE = frozenset({"max_steps", "local_rank"})
"""Numbers for which -1 stands for none."""

_OWN_TYPES = get_type_hints(RunConfig)
_TRAINING_TYPES = get_type_hints(PreferenceTrainingArguments)


def read_types(given: Settings) -> Settings:
    """The settings with their values as the declared types.

    Raises:
        InputError: For the first one that is unknown, of another type, or out of its range.
    """
    loss_types = _loss_types(given)
    return {name: Given(_read(name, item, loss_types), item.where) for name, item in given.items()}


def _read(name: str, given: Given, loss_types: dict[str, Any] | None) -> Any:
    if name.startswith(LOSS_ARG):
        # Names that the loss does not have, it refuses itself, with a list of those that it has.
        return read_value(given.value, (loss_types or {}).get(name.removeprefix(LOSS_ARG), Any), given.where)
    check_setting(name, given.where)
    value = read_choice(name, given.value, given.where)
    if name == "lora_target_modules" and isinstance(value, list):
        value = ",".join(map(str, value))  # as TRL's files have it
    kind = _OWN_TYPES[name] if name in _OWN_TYPES else _TRAINING_TYPES[name]
    return read_value(value, kind, given.where, **_range(name, value))


def _range(name: str, value: Any) -> dict[str, float]:
    if name in ABOVE_ZERO:
        return {"above": 0}
    if name in MAY_BE_MINUS_ONE and value in (-1, "-1"):
        return {}
    return {"at_least": 1 if name in AT_LEAST_ONE or name == "max_steps" else 0}


def _loss_types(given: Settings) -> dict[str, Any] | None:
    """The declared types of the loss's settings; what is not declared takes any."""
    if not any(name.startswith(LOSS_ARG) for name in given):
        return None
    name = given["loss"].value if "loss" in given else "dpo"
    if not isinstance(name, str):
        return None  # refused for its type
    target = LOSSES[name] if name in LOSSES else find_loss(name, LOSSES)
    if not callable(target):
        return None  # refused when the loss is made
    try:
        declared = get_type_hints(target)
    except (NameError, TypeError):
        declared = {}  # annotations of a user's loss that cannot be read
    return {item.name: declared.get(item.name, Any) for item in settings_of(target)}
