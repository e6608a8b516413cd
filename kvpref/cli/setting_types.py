"""Settings of a training run as their declared types. Imported only when a run starts."""

from __future__ import annotations

from typing import Any, get_type_hints

from kvpref.cli.given_settings import LOSS_ARG, Given, Settings
from kvpref.cli.name_checks import check_setting
from kvpref.cli.run_config import RunConfig
from kvpref.cli.setting_values import read_setting
from kvpref.losses import LOSSES
from kvpref.losses.user import find_loss, settings_of
from kvpref.training import PreferenceTrainingArguments

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
        return read_setting(name, given, (loss_types or {}).get(name.removeprefix(LOSS_ARG), Any))
    check_setting(name, given.where)
    return read_setting(name, given, _OWN_TYPES[name] if name in _OWN_TYPES else _TRAINING_TYPES[name])


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
