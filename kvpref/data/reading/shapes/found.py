"""The result of a converter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpref.data.reading.columns import PromptColumn

Row = Mapping[str, Any]
"""A decoded row, without keys that hold null."""

Ratings = tuple[float | None, ...]
"""One number per response, or None where unrated."""


@dataclass(frozen=True, kw_only=True)
class FoundResponses:
    """The responses of a row, with their ratings.

    Args:
        responses: The unchecked responses, by their names in errors; at least one.
        prompt: The unchecked prompt; None for the row's prompt column, if any.
        scores: One per response, or None.
        ranks: Ranks in place of scores, or None.
        labels: (True, False) for a pair, otherwise None.
        read: The columns that all this was made from, except a prompt column.
        unread: Unread parts of these columns, such as ``completions.model``.
        is_single: Whether other rows may hold other responses to the prompt.
        rated_by: The column of a single response's score.
        notice: A note for the report about anything that may surprise.
    """

    responses: Mapping[str, Any]
    prompt: PromptColumn | None = None
    scores: Ratings | None = None
    ranks: Ratings | None = None
    labels: tuple[bool, ...] | None = None
    read: tuple[str, ...] = field(default=())
    unread: tuple[str, ...] = ()
    is_single: bool = False
    rated_by: str | None = None
    notice: str | None = None


Converter = Callable[[Row], FoundResponses | None]
"""Finds the responses of a row; None if the row has another shape.

Raises RowError if the row has the shape but something is wrong with it.
"""
