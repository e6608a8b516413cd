"""Tests, with marker words, whether a chat template reads what a row gives it.

That a short text occurs in the template's output proves little: the "4" of a tool may be the answer's. So the
conversation is written again with words that occur nowhere else in place of what must not be lost. Once per form of
conversation is enough, since templates look at roles and keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeGuard

from kvpref.data.reading.lost_parts import calls_of, function_of, lost_part, lost_tool, lost_turn
from kvpref.data.reading.messages import Message, RowError
from kvpref.data.reading.response_spans import ChatTemplate, Messages

MAX_KNOWN_FORMS = 4096

_Path = tuple[str | int, ...]


class _Part(NamedTuple):
    """Something that must be written: its place in messages and tools, and the error if it is missing."""

    path: _Path
    value: str | dict[str, Any]
    error: RowError


class TemplateProbes:
    """Probes one tokenizer's template, and caches the answers."""

    def __init__(self) -> None:
        self._suspects: dict[Hashable, frozenset[_Path]] = {}
        self._read_names: set[str] = set()
        self._reads_parts_only: bool | None = None

    def reads_parts_only(self, template: ChatTemplate) -> bool:
        """Whether a processor's template writes content only if it is a list of parts."""
        if self._reads_parts_only is None:
            marker, turn = "kvprefmark", {"role": "user", "content": "kvprefmark"}
            self._reads_parts_only = (
                template.processor is not None
                and not _writes(template, turn, marker)
                and _writes(replace(template, reads_parts_only=True), turn, marker)
            )
        return self._reads_parts_only

    def check_settings(self, template: ChatTemplate) -> None:
        """Refuse settings whose names the template never mentions.

        Raises:
            RowError: Naming one.
        """
        for name in template.settings:
            if name in self._read_names or name == "tools":
                continue
            if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", source) for source in template.sources()):
                raise RowError(
                    f"`chat_template_kwargs` holds `{name}`, which the chat template never reads; correct the name, or "
                    "leave it out"
                )
            self._read_names.add(name)

    def check_written(
        self, template: ChatTemplate, prompt: Messages, response: Messages, name: str, *, first: int = 0
    ) -> None:
        """Refuse a template that leaves out a message not from the assistant, a tool call, or a tool.

        If the template refuses the markers, nothing is judged.

        Args:
            template: Writes the messages.
            prompt: The turns of the prompt.
            response: The turns of the response.
            name: The response's name in errors.
            first: Turns before this one are not judged.

        Raises:
            RowError: Naming what is left out.
        """
        messages = (*prompt, *response)
        tools = template.settings.get("tools", ())
        form = first, _form(messages, template.settings)
        suspects = self._suspects.get(form)
        if suspects is None:
            parts = [*_parts_of_messages(messages, len(prompt), name, first), *_parts_of_tools(tools)]
            if len(self._suspects) >= MAX_KNOWN_FORMS:
                self._suspects.clear()
            suspects = self._suspects[form] = frozenset(part.path for part in _suspects(template, messages, parts))
        if suspects:
            for part in (*_parts_of_messages(messages, len(prompt), name, first), *_parts_of_tools(tools)):
                # Its output for this row decides.
                if part.path in suspects and _not_written(template, messages, [part]):
                    raise part.error
        # Tools of an unusual form have no name to mark.
        if tools and not any(_parts_of_tools(tools)) and template.write(messages) == _without_tools(template, messages):
            raise lost_tool("without a name")


def _writes(template: ChatTemplate, turn: Message, marker: str) -> bool:
    try:
        return marker in template.write((turn,))
    except RowError:
        return False


def _suspects(template: ChatTemplate, messages: Messages, parts: AbstractSequence[_Part]) -> AbstractSequence[_Part]:
    missing = _not_written(template, messages, parts)
    if missing is None:
        return [part for part in parts if _not_written(template, messages, [part])]
    return missing


def _not_written(
    template: ChatTemplate, messages: Messages, parts: AbstractSequence[_Part]
) -> AbstractSequence[_Part] | None:
    """The parts whose markers are not written if all are marked at once; None if the template refuses that."""
    # No marker is part of another, and no template has a reason to change such words.
    markers = [f"kvprefmark{index}end" for index in range(len(parts))]
    whole: Any = {"messages": messages, "tools": template.settings.get("tools")}
    for part, marker in zip(parts, markers, strict=True):
        whole = _replaced(whole, part.path, _marked(part, marker))
    if whole["tools"] is not None:
        template = replace(template, settings=template.settings | {"tools": whole["tools"]})
    try:
        text = template.write(tuple(whole["messages"]))
    except RowError:
        return None
    return [part for part, marker in zip(parts, markers, strict=True) if marker not in text]


def _marked(part: _Part, marker: str) -> str | dict[str, Any]:
    if isinstance(part.value, dict):
        return part.value | {marker: marker}
    return json.dumps({marker: marker}) if part.path[-1] == "arguments" else marker


def _replaced(value: Any, path: _Path, new: object) -> Any:
    """A copy of nested objects and lists with a new value at a path."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, dict):
        return value | {key: _replaced(value[key], tuple(rest), new)}
    return [_replaced(item, tuple(rest), new) if index == key else item for index, item in enumerate(value)]


def _parts_of_messages(messages: Messages, num_prompt: int, name: str, first: int) -> Iterator[_Part]:
    for index, turn in enumerate(messages[first:], start=first):
        in_prompt = index < num_prompt
        number, owner = (index + 1, "the prompt") if in_prompt else (index - num_prompt + 1, name)
        for path, content in _texts_of_content(turn["content"]) if turn["role"] != "assistant" else ():
            error = lost_turn(number, turn) if in_prompt else lost_part("`content`", number, owner, content)
            yield _Part(("messages", index, "content", *path), content, error)
        for path, function in calls_of(turn):
            call = f"`tool_calls[{path[1]}]`"
            called = function.get("name")
            if isinstance(called, str):
                error = lost_part(call, number, owner, called)
                yield _Part(("messages", index, *path, "name"), called, error)
            arguments = function.get("arguments")
            if _is_said(arguments):
                error = lost_part(f"the arguments of {call}", number, owner, str(arguments))
                yield _Part(("messages", index, *path, "arguments"), arguments, error)


def _texts_of_content(content: object) -> Iterator[tuple[_Path, str]]:
    """The nonempty texts of a turn, each with its path in the content."""
    if isinstance(content, list):
        for index, part in enumerate(content):
            if part["type"] == "text" and _is_said(part["text"]):
                yield (index, "text"), str(part["text"])
    elif _is_said(content):
        yield (), str(content)


def _parts_of_tools(tools: AbstractSequence[Mapping[str, Any]]) -> Iterator[_Part]:
    for index, tool in enumerate(tools):
        function = function_of(tool)
        if function is not None and isinstance(function.get("name"), str):
            path = ("function", "name") if "function" in tool else ("name",)
            yield _Part(("tools", index, *path), function["name"], lost_tool(repr(function["name"])))


def _form(messages: Messages, settings: Mapping[str, Any]) -> Hashable:
    """What templates may look at besides the texts themselves."""
    tools = tuple(part.path for part in _parts_of_tools(settings.get("tools", ())))
    switches = tuple((name, value if isinstance(value, bool) else None) for name, value in settings.items())
    return tuple(_form_of_turn(turn) for turn in messages), switches, tools


def _form_of_turn(turn: Message) -> Hashable:
    calls = tuple(
        (path, isinstance(function.get("name"), str), type(arguments) if _is_said(arguments) else None)
        for path, function in calls_of(turn)
        for arguments in (function.get("arguments"),)
    )
    content = turn["content"]
    said: Hashable = _is_said(content)
    if isinstance(content, list):
        said = tuple((part["type"], _is_said(part.get("text"))) for part in content)
    return turn["role"], content is None, said, tuple(turn), calls


def _is_said(value: object) -> TypeGuard[str | dict[str, Any]]:
    """Whether there is a nonempty text or arguments (an object, or one as JSON) that could be lost."""
    if isinstance(value, str):
        return bool(value) and not value.isspace() and value != "{}"
    return isinstance(value, dict) and bool(value)


def _without_tools(template: ChatTemplate, messages: Messages) -> str | None:
    settings = {name: value for name, value in template.settings.items() if name != "tools"}
    try:
        return replace(template, settings=settings).write(messages)
    except RowError:
        return None
