"""Rows with only a conversation, ``{"messages": [...]}``: demonstrations with all assistant turns scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpref.data.reading.columns import CONVERSATION_COLUMNS
from kvpref.data.reading.messages import RowError, parse_messages, type_name
from kvpref.data.reading.shapes.lists import RESPONSE_LISTS
from kvpref.data.reading.shapes.pairs import conversation_column
from kvpref.data.reading.shapes.ratings import LABEL_COLUMNS, SCORE_COLUMNS
from kvpref.data.reading.shapes.singles import COMPLETION_COLUMNS
from kvpref.data.reading.sharegpt import as_messages
from kvpref.data.reading.trajectories.attempts import TOKEN_WEIGHTS

_OTHERS = (
    *RESPONSE_LISTS,
    *COMPLETION_COLUMNS,
    *LABEL_COLUMNS,
    *SCORE_COLUMNS,
    "chosen",
    "rejected",
    "rejected_response",
    "rejected_messages",
    "chosen_response",
    "trajectories",
)


def is_conversation(value: object) -> bool:
    """Whether a decoded row has this form, right or wrong."""
    if not isinstance(value, dict) or all(value.get(name) is None for name in CONVERSATION_COLUMNS):
        return False
    return all(value.get(name) is None for name in _OTHERS)


def as_trajectory(value: Mapping[str, Any]) -> dict[str, Any]:
    """The row as a row of a single trajectory.

    Raises:
        RowError: If it has no assistant turn, or does not begin with the row's `prompt`.
    """
    row = {name: item for name, item in value.items() if item is not None}
    name = conversation_column(row)
    assert name is not None
    messages = as_messages(row.pop(name))
    if not isinstance(messages, list):
        raise RowError(f"`{name}` must be a list of messages, found {type_name(messages)}")
    parsed = parse_messages(messages, name)
    if all(message["role"] != "assistant" for message in parsed):
        raise RowError(
            f"`{name}` has no turn of role 'assistant', so there is nothing to train on; kvpref generates no "
            "responses: sample them first, and give them as `responses` with `scores`"
        )
    _drop_prompt(row, name, [message["content"] for message in parsed])
    weights = {TOKEN_WEIGHTS: row.pop(TOKEN_WEIGHTS)} if TOKEN_WEIGHTS in row else {}
    return {**row, "trajectories": [{"messages": list(parsed), **weights}]}


def _drop_prompt(row: dict[str, Any], name: str, contents: list[Any]) -> None:
    """Drop a prompt that the messages repeat, as in UltraChat's rows."""
    if "prompt" not in row:
        return
    prompt = row.pop("prompt")
    if not isinstance(prompt, str) or prompt.strip() not in [
        text.strip() for text in contents if isinstance(text, str)
    ]:
        raise RowError(
            f"found `prompt` and `{name}`, and the messages do not hold the prompt: it may stand before them, or be "
            "another one; keep one of the two"
        )
