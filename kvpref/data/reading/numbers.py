"""Numbers in rows: scores and ranks."""

from __future__ import annotations

import math

from kvpref.data.reading.messages import RowError, type_name


def parse_number(value: object, name: str, *, may_be_null: bool = True) -> float:
    """A finite number.

    Args:
        value: The decoded value, not null.
        name: Its name in errors.
        may_be_null: Whether errors may suggest null, for unrated.

    Raises:
        RowError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"`{name}` must be a number{' or null' if may_be_null else ''}, found {type_name(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(
            f"`{name}` is {number}; expected a finite number{', or null for unrated' if may_be_null else ''}"
        )
    return number


def check_finite(value: object, name: str) -> None:
    """Refuse NaN and infinities in a column that a loss reads, in lists at any depth too.

    Args:
        value: As decoded, of any type.
        name: What errors call it.

    Raises:
        RowError: Naming the entry.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"`{name}` is {value}; expected a finite number, since the loss reads it")
    if isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            if isinstance(entry, float | list | tuple):
                check_finite(entry, f"{name}[{index}]")
