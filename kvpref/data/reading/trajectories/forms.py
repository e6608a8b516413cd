"""The forms in which chat templates take tool calls.

transformers documents `arguments` as an object, and drops keys that are null. Agents that use OpenAI's interface record
`arguments` as JSON text, which some templates also expect; and some templates recognise a message that only calls tools
by its missing content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from kvpref.data.reading.json_text import decode_json
from kvpref.data.reading.lost_parts import calls_of
from kvpref.data.reading.messages import Message
from kvpref.data.reading.trajectories.attempts import Attempt


def forms_of(attempt: Attempt) -> Iterator[Attempt]:
    """The attempt with its calls' arguments as objects, then as JSON text; each with empty content, then without any.

    Yields only distinct forms.
    """
    whole = [message for turn in attempt.turns for message in (*turn.history, turn.message)]
    has_arguments = any("arguments" in function for message in whole for _, function in calls_of(message))
    lacks_content = any(_has_only_calls(message) for message in whole)
    for change in (_with_objects, _with_texts) if has_arguments else (_unchanged,):
        yield _changed(attempt, change)
        if lacks_content:
            yield _changed(attempt, lambda message, change=change: _without_content(change(message)))  # type: ignore[misc]


def prints_objects(attempt: Attempt, written: Message, text: str) -> bool:
    """Whether a template wrote arguments, given as JSON text in the data, as Python literals instead of JSON.

    Args:
        attempt: The attempt as in the data.
        written: One of its turns, as passed to the template.
        text: The template's output.
    """
    if not any(isinstance(function.get("arguments"), str) for _, function in _calls_of_attempt(attempt)):
        return False
    arguments = [function.get("arguments") for _, function in calls_of(written)]
    return any(isinstance(item, dict) and item and str(item) in text for item in arguments)


def _calls_of_attempt(attempt: Attempt) -> Iterator[tuple[Any, Any]]:
    for turn in attempt.turns:
        yield from calls_of(turn.message)


def _changed(attempt: Attempt, change: Callable[[Message], Message]) -> Attempt:
    # Histories share messages, so each is converted once.
    known: dict[int, Message] = {}

    def once(message: Message) -> Message:
        if id(message) not in known:
            known[id(message)] = change(message)
        return known[id(message)]

    turns = (
        replace(turn, history=tuple(map(once, turn.history)), message=once(turn.message)) for turn in attempt.turns
    )
    return replace(attempt, turns=tuple(turns))


def _unchanged(message: Message) -> Message:
    return message


def _has_only_calls(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message["content"]


def _without_content(message: Message) -> Message:
    return message | {"content": None} if _has_only_calls(message) else message


def _with_objects(message: Message) -> Message:
    return _with_arguments(message, _as_object)


def _with_texts(message: Message) -> Message:
    return _with_arguments(message, _as_text)


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    return message | {"tool_calls": [_with_call(call, change) for call in calls]}


def _with_call(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_call(call["function"], change)}
    return call | {"arguments": change(call["arguments"])} if "arguments" in call else call


def _as_object(arguments: Any) -> Any:
    """The object in a JSON text; anything else unchanged, since a model may have written it."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = decode_json(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
