"""The nearest valid name of one that is misspelt."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_SHORTEST_BEGINNING = 4
"""Characters from which on a beginning says what was meant."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The first valid name that begins with `name`, or the one that looks most like it; None if none does."""
    valid = list(valid)
    longer = [other for other in valid if len(name) >= _SHORTEST_BEGINNING and other.startswith(name)]
    found = longer or get_close_matches(name, valid, n=1)
    return found[0] if found else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest name, or nothing."""
    near = nearest(name, valid)
    return "" if near is None else f"; did you mean {near}?"
