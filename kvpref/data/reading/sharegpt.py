"""Messages in ShareGPT's form, ``{"from": "human", "value": ...}``, which LLaMA-Factory and ms-swift read."""

from __future__ import annotations

from typing import Any

from kvpref.data.reading.json_text import decode_json
from kvpref.data.reading.row_errors import RowError, type_name

FUNCTION_CALL = "function_call"
"""The sender of a tool call: the assistant, with the call as JSON in its text."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    FUNCTION_CALL: "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
"""The role of each sender that `from` may name."""


def has_sender(message: dict[str, Any]) -> bool:
    """Whether a message has `from` and `value` in place of `role` and `content`."""
    return message.get("role") is None and message.get("from") is not None


def with_role(message: dict[str, Any], name: str) -> dict[str, Any]:
    """A message with `from` and `value` as one with `role` and `content`; other keys stay.

    Args:
        message: The decoded message.
        name: Its name in errors.

    Raises:
        RowError: If the sender is unknown, it also has `content`, or a tool call is not JSON.
    """
    sender = message["from"]
    if not isinstance(sender, str) or sender not in ROLES:
        raise RowError(f"`{name}.from` is {sender!r}; expected one of {', '.join(ROLES)}")
    if "content" in message:
        raise RowError(f"`{name}` has both `from` and `content`; expected {{role, content}} or {{from, value}}")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    value = message.get("value")
    if sender == FUNCTION_CALL:
        return {"role": "assistant", "content": "", **rest, "tool_calls": _calls(value, f"{name}.value")}
    return {"role": ROLES[sender], **({} if value is None else {"content": value}), **rest}


def as_messages(conversation: Any) -> Any:
    """A conversation of rounds, ``[{"human": question, "assistant": answer}]``, as messages; others unchanged."""
    if not isinstance(conversation, list) or not all(map(_is_round, conversation)):
        return conversation
    return [{"from": key, "value": text} for one in conversation for key, text in one.items()]


def _is_round(item: Any) -> bool:
    asks, answers = {"human", "user", "tool"}, {"assistant", "gpt", "bot"}
    return isinstance(item, dict) and len(item) == 2 and bool(asks & set(item)) and bool(answers & set(item))


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = decode_json(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"`{name}` of a {FUNCTION_CALL} is not valid JSON ({error})") from error
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise RowError(f"`{name}` of a {FUNCTION_CALL} must be {{name, arguments}}, found {type_name(call)}")
    return [{"type": "function", "function": call} for call in calls]
