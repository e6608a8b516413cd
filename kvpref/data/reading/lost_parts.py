"""Whether a chat template wrote all that a row says."""

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

    White space is not compared, since templates strip it; a part may stand there as in JSON.

    Args:
        response: Its turns.
        text: What the template wrote for prompt and response.
        spans: Where in it the assistant's turns stand, in their order.
        name: What errors call the response.

    Raises:
        RowError: Naming the part.
    """
    remaining = iter(spans)
    for number, turn in enumerate(response, start=1):
        # What tools and users say stands somewhere behind the first turn.
        start, end = next(remaining) if turn["role"] == "assistant" else (spans[0][0], len(text))
        for part, value in parts_of(turn):
            if value not in text[start:end] and not _is_written(value, text[:start], text[start:end]):
                raise lost_part(part, number, name, value)


def check_prompt_written(
    prompt: AbstractSequence[Message], tools: AbstractSequence[Mapping[str, Any]], text: str
) -> None:
    """Refuse a template that leaves out what the prompt says, or tools.

    Of earlier assistant turns only tool calls are looked for; what they say may be shortened.

    Args:
        prompt: Its turns.
        tools: What may be called.
        text: What the template wrote.

    Raises:
        RowError: Naming what is left out.
    """
    for number, turn in enumerate(prompt, start=1):
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
    """The error for something of `tools`."""
    return RowError(
        f"the chat template does not write the tool {tool} of `tools`; remove the column from the data, or "
        "use a template that writes tools"
    )


def _is_written(value: str, before: str, written: str) -> bool:
    squeezed = _without_spaces(written)
    for form in {_without_spaces(value), _without_spaces(json.dumps(value, ensure_ascii=False)[1:-1])}:
        # A generation prompt that begins the answer (`<think>`) may have taken the beginning of the content.
        begun = _without_spaces(before[-2 * len(form) :])[-len(form) + 1 :] if len(form) > 1 else ""
        if form in begun + squeezed:
            return True
    return False


def parts_of(turn: Message) -> Iterator[tuple[str, str]]:
    """What an assistant's turn says that a template must write, each with its name."""
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
    """The functions that a turn calls, each with where it stands in the turn."""
    calls = turn.get("tool_calls")
    for index, call in enumerate(calls if isinstance(calls, list) else ()):
        function = function_of(call)
        if function is not None:
            yield ("tool_calls", index, "function") if "function" in call else ("tool_calls", index), function


def function_of(value: object) -> Mapping[str, Any] | None:
    """The function of a tool or a call, which may stand in it or be it; None if it is neither."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    return function if isinstance(function, Mapping) else None


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _quote(value: str) -> str:
    flat = " ".join(value.split())
    return repr(flat if len(flat) <= 40 else f"{flat[:37]}...")
