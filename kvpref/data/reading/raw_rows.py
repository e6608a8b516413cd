"""A decoded row and its location."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RawRow:
    """One decoded row, or the reason why it could not be decoded.

    Args:
        location: ``file:line``, ``file:row N``, or ``row N`` in memory, counted from 1.
        value: The decoded value, of any type.
        error: Why there is no value, or None.
        left_out: Columns of its table that were not decoded because they are not read.
        moved: Fields that are read under another name, as ``(name of the data, name that it is read by)``.
    """

    location: str
    value: object = None
    error: str | None = None
    left_out: tuple[str, ...] = ()
    moved: tuple[tuple[str, str], ...] = ()
