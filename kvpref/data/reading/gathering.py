"""Gathers rows of one response each into groups, by their prompt or by a column."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from typing import Any, NamedTuple

from kvpref.data.reading.messages import RowError, type_name
from kvpref.data.reading.rows import PreferenceRow
from kvpref.data.reading.trajectories.attempts import TOKEN_WEIGHTS


class SingleRow(NamedTuple):
    """A checked row of one response, its location, and the value that it is grouped by."""

    location: str
    row: PreferenceRow
    group: str | None = None


class SingleRows:
    """Collects all rows of each prompt, or of each value of a column, wherever they are in the data.

    Args:
        group_by: The column whose value rows of a group share; None for the prompt.
    """

    def __init__(self, group_by: str | None = None) -> None:
        self._group_by = group_by
        self._first_rated: SingleRow | None = None
        self._waiting: dict[object, list[SingleRow]] = {}

    def add(self, location: str, row: PreferenceRow, value: Mapping[str, Any]) -> None:
        """Keep a row.

        Args:
            location: Its location.
            row: The parsed row.
            value: The decoded row.

        Raises:
            RowError: If it has no value in the column to group by, or another column rates it than the rows before.
        """
        self._check_rating(row)
        group = None if self._group_by is None else _group_of(value, self._group_by)
        key = _digest(row) if group is None else group
        member = SingleRow(location, row, group)
        self._waiting.setdefault(key, []).append(member)
        if self._first_rated is None and row.rated_by is not None:
            self._first_rated = member

    def _check_rating(self, row: PreferenceRow) -> None:
        first = self._first_rated
        if first is not None and row.rated_by not in (None, first.row.rated_by):
            raise RowError(
                f"the response is rated by `{row.rated_by}`, and that at {first.location} by `{first.row.rated_by}`; "
                "rate all responses by one column, or give the rows as two DATA"
            )

    def groups(self) -> Iterator[list[SingleRow]]:
        """The rows of each group, ordered by their first rows.

        If no row of a prompt is rated, they are demonstrations, each its own group.
        """
        for members in self._waiting.values():
            if self._group_by is None and all(member.row.rated_by is None for member in members):
                yield from ([member] for member in members)
            else:
                yield members


def group_name(members: AbstractSequence[SingleRow]) -> str:
    """The id of the group: the location of its first row, and the value that it is grouped by."""
    location, _, group = members[0]
    return location if group is None else f"{location} ({group})"


def join_singles(members: AbstractSequence[SingleRow], group_by: str | None = None) -> PreferenceRow:
    """One row with the responses of several rows.

    Args:
        members: At least one row, all with the same prompt.
        group_by: The column that they were gathered by, for errors.

    Raises:
        RowError: If two rows have different prompts, tools or images.
    """
    first = members[0]
    for member in members[1:]:
        _check_alike(first, member, group_by)
    rows = [member.row for member in members]
    is_rated = any(row.rated_by is not None for row in rows)
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return replace(
        first.row,
        responses=tuple(response for row in rows for response in row.responses),
        scores=tuple(score for row in rows for score in row.scores or (None,)) if is_rated else None,
        # Only token weights may be missing; they are then 1.
        columns={name: [_value(row, name) for row in rows] for name in names},
        names=tuple(
            member.row.names[0] if len(members) == 1 else f"{member.row.names[0]} of {member.location}"
            for member in members
        ),
        unread=tuple(dict.fromkeys(name for row in rows for name in row.unread)),
        notices=tuple(dict.fromkeys(notice for row in rows for notice in row.notices)),
        num_rows=len(members),
    )


def _value(row: PreferenceRow, name: str) -> Any:
    return row.columns.get(name) if name == TOKEN_WEIGHTS else row.columns[name]


def _group_of(value: Mapping[str, Any], column: str) -> str:
    group = value.get(column)
    if group is None:
        found = ", ".join(map(str, value)) or "none"
        raise RowError(f"missing column `{column}`, which rows are gathered by (--group-by); found {found}")
    if isinstance(group, bool) or not isinstance(group, str | int):
        raise RowError(f"`{column}`, which rows are gathered by, must be a string or integer; found {type_name(group)}")
    return str(group)


def _check_alike(first: SingleRow, other: SingleRow, group_by: str | None) -> None:
    same = f" of the same `{group_by}`, {first.group!r}" if group_by else ", to the same prompt"
    for name, own, found in (
        ("prompt", first.row.prompt, other.row.prompt),
        ("tools or chat_template_kwargs", first.row.template_settings, other.row.template_settings),
        ("images", first.row.images, other.row.images),
    ):
        if own != found:
            raise RowError(
                f"`{name}` differs from that of the row at {first.location}{same}; responses of a group answer the "
                "same prompt: correct the row, or gather by another column",
                other.location,
            )


def _digest(row: PreferenceRow) -> bytes:
    """A digest that is equal if prompt, tools and images are."""
    content = [row.prompt, dict(row.template_settings), row.images]
    text = json.dumps(content, sort_keys=True, default=_content_of)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _content_of(value: Any) -> str:
    """The content of a value unknown to JSON: the pixels of a picture, or its printed form."""
    return value.tobytes().hex() if hasattr(value, "tobytes") else repr(value)
