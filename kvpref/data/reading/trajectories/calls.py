"""Rows of one model call each: ``{"messages": history, "response", "id": task, "score"}``, gathered into tasks."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from kvpref.data.reading.columns import find_system, template_settings, without_nulls
from kvpref.data.reading.messages import Message, RowError, parse_messages, type_name
from kvpref.data.reading.numbers import check_finite, parse_number
from kvpref.data.reading.trajectories.attempts import TURN_SCORES, Attempt, Task, Turn
from kvpref.data.reading.trajectories.rows import (
    check_all_or_none,
    missing_column,
    parse_conversation,
    parse_id,
    refuse_pictures,
    turns_of,
)

EXPECTED_CALLS = "{messages, response, id, score}, optionally with attempt and tools"

_FIELDS = {"messages", "response", "id", "attempt", "score", "system", "tools", "chat_template_kwargs"}
_OTHER_SHAPES = ("prompt", "chosen", "rejected", "responses", "scores", "ranks")
_NO_CALLS = (*_OTHER_SHAPES, "completions", "completion", "label", "kto_tag", "rejected_response", "rejected_messages")


@dataclass(frozen=True)
class Call:
    """One checked row.

    Args:
        location: Where it stands.
        task: Its `id`.
        turns: The assistant's turns of its response.
        attempt: Which attempt at the task it belongs to; None where it is a response by itself.
        score: Or None where unrated.
        columns: Extra fields that were asked for.
        unread: Names of fields that nothing reads.
    """

    location: str
    task: str
    turns: tuple[Turn, ...]
    attempt: Hashable = None
    score: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def is_call(value: object) -> bool:
    """Whether a decoded row is of this form, right or wrong."""
    if not isinstance(value, dict) or value.get("messages") is None:
        return False
    if value.get("response") is not None:
        return True
    # Messages alone are a demonstration, or, with a label or score, a response to be judged.
    is_log = "response" in value or value.get("attempt") is not None
    return is_log and all(value.get(name) is None for name in _NO_CALLS)


def parse_call(value: Mapping[str, Any], location: str, columns: AbstractSequence[str] = ()) -> Call:
    """Check one decoded row of a call.

    Args:
        value: What was decoded.
        location: Where it stands.
        columns: Extra fields to keep; `turn_scores` comes of the scores.

    Raises:
        RowError: If it has another form, or lacks a column.
    """
    row = without_nulls(dict(value))
    others = [name for name in _OTHER_SHAPES if name in row]
    if others:
        raise RowError(f"found both `messages` and `{others[0]}`; expected {EXPECTED_CALLS}")
    for name in ("response", "id"):
        if name not in row:
            raise RowError(f"missing field `{name}` beside `messages`; expected {EXPECTED_CALLS}")
    refuse_pictures(row)
    attempt = row.get("attempt")
    if isinstance(attempt, bool) or not isinstance(attempt, str | int | None):
        raise RowError(f"`attempt` must be a string or an integer, found {type_name(attempt)}")
    columns = [name for name in columns if name != TURN_SCORES]
    for name in columns:
        if name not in row:
            raise missing_column(name, row)
        check_finite(row[name], name)
    history = parse_conversation(row["messages"], "messages", find_system(row))
    response = _parse_response(row["response"])
    turns = turns_of((*history, *response), "response", template_settings(row), len(history), location)
    task = parse_id(row)
    assert task is not None
    return Call(
        location,
        task,
        turns,
        attempt,
        None if "score" not in row else parse_number(row["score"], "score"),
        {name: row[name] for name in columns},
        tuple(str(name) for name in row if name not in {*_FIELDS, *columns}),
    )


def gather(calls: AbstractSequence[Call], *, by_turn: bool = False) -> Task:
    """The task of some calls, in the order in which attempts and responses first appear.

    Args:
        calls: All that have the same id, in the order of the file.
        by_turn: Whether scores are to be by turn, also where those of an attempt agree.

    Raises:
        RowError: If some belong to an attempt and others do not, some calls of an attempt have no score, some calls
            lack a column, or an attempt has a call twice.
    """
    loose = [f"the call at {call.location}" for call in calls if call.attempt is None]
    check_all_or_none("attempt", loose, calls)
    for name in dict.fromkeys(name for call in calls for name in call.columns):
        check_all_or_none(name, [f"the call at {call.location}" for call in calls if name not in call.columns], calls)
    attempts: dict[Hashable, list[Call]] = {}
    for index, call in enumerate(calls):
        attempts.setdefault(index if call.attempt is None else call.attempt, []).append(call)
    joined = tuple(_join(members) for members in attempts.values())
    unread = dict.fromkeys(name for call in calls for name in call.unread)
    if by_turn or any(attempt.turn_scores is not None for attempt in joined):
        joined = tuple(map(_by_turn, joined))
        check_all_or_none("score", [attempt.name for attempt in joined if attempt.turn_scores is None], joined)
    return Task(joined, calls[0].task, {}, tuple(unread))


def _parse_response(value: object) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "assistant", "content": value},)
    if not isinstance(value, dict | list):
        raise RowError(f"`response` must be a string, a message or a list of messages, found {type_name(value)}")
    return parse_messages(value, "response")


def _join(calls: list[Call]) -> Attempt:
    """The calls of one attempt as one response."""
    turns = tuple(turn for call in calls for turn in call.turns)
    first = calls[0]
    _refuse_copies(calls)
    name = "the response" if first.attempt is None else f"attempt {first.attempt!r} of {first.task!r}"
    unrated = [f"the call at {call.location}" for call in calls if call.score is None]
    check_all_or_none("score", unrated, calls)
    scores = [call.score for call in calls]
    score, turn_scores = scores[0], None
    if any(other != score for other in scores):
        score, turn_scores = None, tuple(call.score or 0.0 for call in calls for _ in call.turns)
    columns = {name: _join_values([call.columns[name] for call in calls], calls, name) for name in first.columns}
    return Attempt(turns, name, score, turn_scores, columns)


def _refuse_copies(calls: list[Call]) -> None:
    """Raise RowError if an attempt has the same call twice, whose tokens would count twice."""
    known: dict[str, Call] = {}
    for call in calls:
        messages = [[*turn.history, turn.message] for turn in call.turns]
        earlier = known.setdefault(json.dumps(messages, sort_keys=True, default=repr), call)
        if earlier is not call:
            raise RowError(
                f"the call is that at {earlier.location} again, of attempt {call.attempt!r} of {call.task!r}; leave "
                "one of the two out",
                call.location,
            )


def _join_values(values: list[Any], calls: list[Call], name: str) -> Any:
    """A column over the calls of an attempt: lists one after another, numbers by turn where they differ."""
    lists = [isinstance(value, list) for value in values]
    if any(lists) and not all(lists):
        number = calls[lists.index(False)]
        raise RowError(
            f"`{name}` is no list here, and one in other calls of attempt {number.attempt!r}; give lists in all",
            number.location,
        )
    if all(isinstance(value, list) for value in values):
        return list(chain.from_iterable(values))
    if all(value == values[0] for value in values):
        return values[0]
    return [value for value, call in zip(values, calls, strict=True) for _ in call.turns]


def _by_turn(attempt: Attempt) -> Attempt:
    """An attempt in whose task others are scored by turn: a score of its own is that of each of its turns."""
    if attempt.turn_scores is not None or attempt.score is None:
        return attempt
    return Attempt(attempt.turns, attempt.name, None, (attempt.score,) * len(attempt.turns), attempt.columns)
