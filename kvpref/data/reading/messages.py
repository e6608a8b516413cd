"""Checks chat messages of rows and brings them to one form."""

from __future__ import annotations

from typing import Any

from kvpref.data.reading.row_errors import MissingFieldError as MissingFieldError
from kvpref.data.reading.row_errors import RowError as RowError
from kvpref.data.reading.row_errors import TemplateRefusalError as TemplateRefusalError
from kvpref.data.reading.row_errors import type_name as type_name
from kvpref.data.reading.sharegpt import has_sender, with_role

Message = dict[str, Any]
"""One chat message: ``role``, ``content`` (strings) and whatever else the chat template reads."""

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields with the model's thinking before its answer; each family of templates reads one of them."""


def parse_turns(value: object, name: str) -> str | tuple[Message, ...]:
    """A response: a text, or one or more messages.

    Raises:
        RowError: If it is neither, or empty.
    """
    if isinstance(value, str):
        return parse_text(value, name)
    if not isinstance(value, (dict, list)):
        raise RowError(f"`{name}` must be a string or a list of messages, found {type_name(value)}")
    messages = parse_messages(value, name)
    if not any(text_of(message).strip() or image_parts(message) or _says_more(message) for message in messages):
        raise RowError(f"`{name}` is empty: no message has any content")
    return messages


def parse_text(value: str, name: str, may_be_empty: bool = False) -> str:
    """The text, if it can be encoded.

    Raises:
        RowError: If it cannot, or is empty and may not be.
    """
    if not value and not may_be_empty:
        raise RowError(f"`{name}` is empty")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(f"`{name}` holds half of a surrogate pair at character {error.start + 1}") from error
    return value


def parse_messages(value: dict[str, Any] | list[Any], name: str) -> tuple[Message, ...]:
    """One message or a list of them.

    Raises:
        RowError: If there are none, or one is bad.
    """
    messages = [value] if isinstance(value, dict) else value
    if not messages:
        raise RowError(f"`{name}` is empty: expected at least one message")
    return tuple(_parse_message(message, f"{name}[{index}]") for index, message in enumerate(messages))


def _parse_message(message: object, name: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"`{name}` must be a message with `role` and `content`, found {type_name(message)}")
    # Arrow tables fill keys that only other rows have with nulls; templates react to a key's presence.
    kept = {key: item for key, item in message.items() if item is not None}
    if has_sender(kept):
        kept = with_role(kept, name)
    parts: Any = kept.get("content")
    if isinstance(parts, list):
        parts = _parse_parts(parts, f"{name}.content")
        kept["content"] = "".join(part.get("text", "") for part in parts)
    # A message that calls tools needs no content: null, "" and a missing key become one form.
    # The same holds for a tool that returned nothing.
    may_be_silent = kept.get("role") == "tool" or (kept.get("role") == "assistant" and _says_more(kept))
    if "content" not in kept and may_be_silent:
        kept["content"] = ""
    for key in ("role", "content"):
        if key not in kept:
            raise RowError(f"`{name}` is a message without `{key}`; expected {{role, content}}")
        if not isinstance(kept[key], str):
            raise RowError(f"`{name}.{key}` must be a string, found {type_name(kept[key])}")
        parse_text(kept[key], f"{name}.{key}", may_be_empty=key == "content")
    if isinstance(parts, list) and any(part["type"] == "image" for part in parts):
        kept["content"] = parts
    return kept


def _says_more(message: Message) -> bool:
    return bool(message.get("tool_calls")) or any(message.get(field) for field in REASONING_FIELDS)


def image_parts(message: Message) -> list[dict[str, Any]]:
    """The parts of a message that are images."""
    content = message.get("content")
    return [part for part in content if part["type"] == "image"] if isinstance(content, list) else []


def texts_of(message: Message) -> list[str]:
    """The texts of a message's content: one, or those of its parts."""
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content if part["type"] == "text"]
    return [content or ""]


def text_of(message: Message) -> str:
    """All text of a message's content."""
    return "".join(texts_of(message))


def _parse_parts(parts: list[Any], name: str) -> list[dict[str, Any]]:
    """Content as a list of parts, as for multimodal templates; images stay as in the row."""
    parsed = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict):
            raise RowError(f"`{name}` must be a string or a list of parts, found {type_name(part)} in a list")
        kind = part.get("type", "text")
        if kind in _IMAGE_KEYS:
            parsed.append(_parse_image(part, kind, f"{name}[{index}]"))
        elif kind == "text" and isinstance(part.get("text"), str):
            parsed.append({"type": "text", "text": parse_text(part["text"], f"{name}[{index}]", may_be_empty=True)})
        else:
            raise RowError(
                f"`{name}[{index}]` is a part of type {kind!r}; only text and images are supported: "
                '{"type": "text", "text": ...}, {"type": "image"}'
            )
    return parsed


_IMAGE_KEYS = {"image": ("image", "url", "path", "base64", "bytes"), "image_url": ("image_url",)}
"""Types of image parts, and the keys that may hold the image itself."""


def _parse_image(part: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    found = [key for key in _IMAGE_KEYS[kind] if part.get(key) not in (None, "", {})]
    if len(found) > 1:
        raise RowError(f"`{name}` holds several images: {', '.join(found)}; keep one")
    if not found:
        if kind == "image_url":
            raise RowError(f"`{name}` is of type 'image_url' and has no address in `image_url`")
        return {"type": "image"}
    value = part[found[0]]
    if found[0] in ("base64", "bytes"):
        value = {found[0]: value}
    return {"type": "image", "image": value}
