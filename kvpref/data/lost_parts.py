"""Whether a chat template wrote all that a response says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence

from kvpref.data.messages import REASONING_FIELDS, Message, RowError


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
    whole = text[spans[0][0] :]
    for number, turn in enumerate(response, start=1):
        written = text[slice(*next(remaining))] if turn["role"] == "assistant" else whole
        squeezed = None
        for part, value in _parts(turn):
            if value in written:
                continue
            squeezed = _without_spaces(written) if squeezed is None else squeezed
            if not any(form in squeezed for form in _forms(value)):
                raise RowError(
                    f"the chat template does not write {part} of turn {number} of {name} ({_quote(value)}); "
                    "remove it from the data, or use a template that writes it"
                )


def _parts(turn: Message) -> Iterator[tuple[str, str]]:
    for key in ("content", *REASONING_FIELDS):
        if isinstance(turn.get(key), str):
            yield f"`{key}`", turn[key]
    for index, call in enumerate(turn.get("tool_calls") or ()):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            continue
        if isinstance(function.get("name"), str):
            yield f"`tool_calls[{index}]`", function["name"]
        if isinstance(function.get("arguments"), dict):
            for key in function["arguments"]:
                yield f"argument {key!r} of `tool_calls[{index}]`", str(key)


def _forms(value: str) -> tuple[str, str]:
    return _without_spaces(value), _without_spaces(json.dumps(value, ensure_ascii=False)[1:-1])


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _quote(value: str) -> str:
    flat = " ".join(value.split())
    return repr(flat if len(flat) <= 40 else f"{flat[:37]}...")
