"""Checks that a chat template wrote everything that a row contains."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from typing import Any

from kvpref.data.reading.messages import REASONING_FIELDS, Message, RowError, text_of, texts_of


def check_nothing_lost(
    response: AbstractSequence[Message], text: str, spans: AbstractSequence[tuple[int, int]], name: str
) -> None:
    """Refuse a template that leaves out a part of a response.

    White space is ignored, since templates strip it; a part may also be written as JSON.

    Args:
        response: The turns of the response.
        text: The template's output for prompt and response.
        spans: The assistant's turns in the text, in order.
        name: The response's name in errors.

    Raises:
        RowError: Naming the part.
    """
    remaining = iter(spans)
    for number, turn in enumerate(response, start=1):
        # Messages of tools and users come somewhere after the first turn.
        start, end = next(remaining) if turn["role"] == "assistant" else (spans[0][0], len(text))
        for part, value in parts_of(turn):
            if value not in text[start:end] and not _is_written(value, text[:start], text[start:end]):
                raise lost_part(part, number, name, value)


def check_prompt_written(
    prompt: AbstractSequence[Message], tools: AbstractSequence[Mapping[str, Any]], text: str, *, first: int = 0
) -> None:
    """Refuse a template that leaves out a part of the prompt, or tools.

    In earlier assistant turns only tool calls are checked; their texts may be shortened.

    Args:
        prompt: The turns of the prompt.
        tools: The tools that may be called.
        text: The template's output.
        first: Turns before this one are not checked.

    Raises:
        RowError: Naming what is left out.
    """
    for number, turn in enumerate(prompt[first:], start=first + 1):
        for content in texts_of(turn) if turn["role"] != "assistant" else ():
            if content not in text and not _is_written(content, "", text):
                raise lost_turn(number, turn)
        for part, value in _parts_of_calls(turn):
            if value not in text and not _is_written(value, "", text):
                raise lost_part(part, number, "the prompt", value)
    for tool in tools:
        function = function_of(tool)
        name = function.get("name") if function is not None else None
        if isinstance(name, str) and name not in text:
            raise lost_tool(repr(name))


def lost_turn(number: int, turn: Message) -> RowError:
    """The error for a turn of the prompt."""
    return RowError(
        f"the chat template does not write turn {number} of the prompt, of role {turn['role']!r} "
        f"({_quote(text_of(turn))}); remove it from the data, or use a template that writes it"
    )


def lost_part(part: str, number: int, name: str, value: str) -> RowError:
    """The error for a part of a turn of the prompt or of a response."""
    return RowError(
        f"the chat template does not write {part} of turn {number} of {name} ({_quote(value)}); "
        "remove it from the data, or use a template that writes it"
    )


def lost_tool(tool: str) -> RowError:
    """The error for an entry of `tools`."""
    return RowError(
        f"the chat template does not write the tool {tool} of `tools`; remove the column from the data, or "
        "use a template that writes tools"
    )


def _is_written(value: str, before: str, written: str) -> bool:
    squeezed = _without_spaces(written)
    for form in {_without_spaces(value), _without_spaces(json.dumps(value, ensure_ascii=False)[1:-1])}:
        # A generation prompt that begins the answer (`<think>`) may already contain the beginning of the content.
        begun = _without_spaces(before[-2 * len(form) :])[-len(form) + 1 :] if len(form) > 1 else ""
        if form in begun + squeezed:
            return True
    return False


def parts_of(turn: Message) -> Iterator[tuple[str, str]]:
    """The parts of an assistant's turn that a template must write, each with its name."""
    for key in ("content", *REASONING_FIELDS):
        if isinstance(turn.get(key), str):
            yield f"`{key}`", turn[key]
    yield from _parts_of_calls(turn)


def _parts_of_calls(turn: Message) -> Iterator[tuple[str, str]]:
    for (_, index, *_), function in calls_of(turn):
        if isinstance(function.get("name"), str):
            yield f"`tool_calls[{index}]`", function["name"]
        if isinstance(function.get("arguments"), dict):
            for key in function["arguments"]:
                yield f"argument {key!r} of `tool_calls[{index}]`", str(key)


def calls_of(turn: Message) -> Iterator[tuple[tuple[str | int, ...], Mapping[str, Any]]]:
    """The functions that a turn calls, each with its path in the turn."""
    calls = turn.get("tool_calls")
    for index, call in enumerate(calls if isinstance(calls, list) else ()):
        function = function_of(call)
        if function is not None:
            yield ("tool_calls", index, "function") if "function" in call else ("tool_calls", index), function


def function_of(value: object) -> Mapping[str, Any] | None:
    """The function of a tool or call, nested or the object itself; None if there is none."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    return function if isinstance(function, Mapping) else None


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _quote(value: str) -> str:
    flat = " ".join(value.split())
    return repr(flat if len(flat) <= 40 else f"{flat[:37]}...")
