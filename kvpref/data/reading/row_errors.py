"""Errors in single rows."""

from __future__ import annotations


class RowError(ValueError):
    """One row is bad; the message is the reason, without the place.

    Args:
        reason: What was found, and what to do.
        location: The location, if it is not that of the current row.
    """

    def __init__(self, reason: str, location: str | None = None) -> None:
        super().__init__(reason)
        self.location = location


class MissingFieldError(RowError):
    """The row lacks a field, or all fields that could hold what is needed."""


class TemplateRefusalError(RowError):
    """The chat template raised an error."""


def type_name(value: object) -> str:
    """The type of a decoded value, in JSON's words where it has one."""
    return {"dict": "object", "str": "string", "NoneType": "null", "bool": "boolean"}.get(
        type(value).__name__, type(value).__name__
    )
