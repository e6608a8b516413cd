"""Settings whose value is one of a few names, known without importing what they choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpref.cli.nearest import did_you_mean
from kvpref.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "auto")
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

CHOICES = {
    "dtype": DTYPES,
    "mode": ("two_pass", "one_pass", "packed", "padded"),
    "schedule": ("full", "bounded"),
    "prefix_cache": ("device", "cpu"),
    "checkpoint": ("none", "prefix", "all"),
    "on_bad_row": ("stop", "skip"),
    "trajectory_groups": ("task", "turn"),
    "gather_weights": ("chunk", "step"),
    "reduce_grads": ("chunk", "step"),
    "reference": ("start", "base"),
}
"""The values of each setting."""


def read_choice(name: str, value: Any, where: str) -> Any:
    """The value of a setting, short names of dtypes in full; what is not text is left for its type to refuse.

    Args:
        name: A key of `CHOICES`; any other setting is left alone.
        value: As it was given.
        where: What to call the setting in a message.

    Raises:
        InputError: If it is none of the values, with the nearest of them.
    """
    if name not in CHOICES or not isinstance(value, str):
        return value
    value = SHORT_DTYPES.get(value, value) if name == "dtype" else value
    if value not in CHOICES[name]:
        near = did_you_mean(value, CHOICES[name])
        raise InputError(f"{where}: expected one of {', '.join(CHOICES[name])}; got {value!r}{near}")
    return value


def chosen(name: str) -> Callable[[str | None], str | None]:
    """A callback of Typer that reads an option as `read_choice` does, before the command imports anything."""

    def read(value: str | None) -> str | None:
        found: str | None = read_choice(name, value, "--" + name.replace("_", "-"))
        return found

    return read
