"""Checks of a loss's settings; every message names the loss and the setting."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from kvpref.errors import InputError


def check_positive(loss: str, **settings: Any) -> None:
    """Raise InputError for a setting that is not a finite number above 0."""
    for setting, value in settings.items():
        if not (_is_number(value) and value > 0):
            raise InputError(f"{loss}: {setting} must be positive; got {value!r}")


def check_not_negative(loss: str, **settings: Any) -> None:
    """Raise InputError for a setting that is not a finite number of at least 0."""
    for setting, value in settings.items():
        if not (_is_number(value) and value >= 0):
            raise InputError(f"{loss}: {setting} must be 0 or more; got {value!r}")


def check_number(loss: str, **settings: Any) -> None:
    """Raise InputError for a setting that is not a finite number."""
    for setting, value in settings.items():
        if not _is_number(value):
            raise InputError(f"{loss}: {setting} must be a number; got {value!r}")


def check_between(loss: str, low: float, high: float, *, ends: str, **settings: Any) -> None:
    """Raise InputError for a setting outside an interval.

    Args:
        loss: Its registered name.
        low: Lower end.
        high: Upper end.
        ends: Which ends are included, as brackets: ``[]``, ``[)``, ``(]`` or ``()``.
        **settings: The values to check, by name.
    """
    for setting, value in settings.items():
        inside = _is_number(value) and low <= value <= high
        excluded = (ends[0] == "(" and value == low) or (ends[1] == ")" and value == high)
        if not inside or excluded:
            raise InputError(f"{loss}: {setting} must be in {ends[0]}{low:g}, {high:g}{ends[1]}; got {value!r}")


def check_choice(loss: str, choices: Iterable[str], **settings: Any) -> None:
    """Raise InputError for a setting that is none of the choices."""
    valid = list(choices)
    for setting, value in settings.items():
        if value not in valid:
            raise InputError(f"{loss}: unknown {setting} {value!r}; choose from: {', '.join(valid)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
