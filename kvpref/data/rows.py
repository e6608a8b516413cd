"""Rows of the shapes that preference data comes in, checked and brought to one form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvpref.data.messages import Message, RowError, parse_messages, parse_text, parse_turns, type_name

EXPECTED_SHAPES = "{prompt, chosen, rejected}, {chosen, rejected} or {prompt, responses, scores or ranks}"


@dataclass(frozen=True)
class PreferenceRow:
    """One row, checked, with its responses in one list.

    Args:
        prompt: A text, a non-empty tuple of messages, or None where the prompt is what the texts have in common.
        responses: Texts, or (exactly where the prompt is messages) non-empty tuples of messages.
        scores: One float or None per response, or None.
        labels: (True, False) for a chosen/rejected pair, otherwise None.
        columns: Extra fields that were asked for, as they stand in the row.
        template_settings: Keyword arguments for the chat template, such as ``tools``.
    """

    prompt: str | tuple[Message, ...] | None
    responses: tuple[str | tuple[Message, ...], ...]
    scores: tuple[float | None, ...] | None = None
    labels: tuple[bool, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    template_settings: Mapping[str, Any] = field(default_factory=dict)


def parse_row(value: object, columns: AbstractSequence[str] = ()) -> PreferenceRow:
    """Check one decoded row. A field that is null counts as missing; unknown fields are ignored.

    Args:
        value: What was decoded.
        columns: Extra fields to keep, of any type.

    Raises:
        RowError: If the row has none of the known shapes, or lacks one of the columns.
    """
    if not isinstance(value, dict):
        raise RowError(f"expected a JSON object, found {type_name(value)}")
    row = {key: item for key, item in value.items() if item is not None}
    for name in columns:
        if name not in row:
            raise RowError(f"missing column `{name}`, which the loss reads; found {', '.join(map(str, row)) or 'none'}")
    parsed = _parse_shape(row)
    return replace(parsed, columns={name: row[name] for name in columns}) if columns else parsed


def _parse_shape(row: dict[str, Any]) -> PreferenceRow:
    is_pair = "chosen" in row or "rejected" in row
    if is_pair and "responses" in row:
        raise RowError("found both `responses` and `chosen`/`rejected`; keep one of the two")
    if not is_pair:
        return _parse_group(row)
    for name in ("chosen", "rejected"):
        if name not in row:
            raise RowError(f"missing field `{name}`; expected {EXPECTED_SHAPES}")
    responses = {name: parse_turns(row[name], name) for name in ("chosen", "rejected")}
    if responses["chosen"] == responses["rejected"]:
        raise RowError("`chosen` and `rejected` are the same, so the pair holds no preference")
    prompt, turns = _join(row, responses)
    return PreferenceRow(prompt, turns, labels=(True, False))


def _parse_group(row: dict[str, Any]) -> PreferenceRow:
    for name in ("responses", "prompt"):
        if name not in row:
            raise RowError(f"missing field `{name}`; expected {EXPECTED_SHAPES}")
    responses = row["responses"]
    if not isinstance(responses, list):
        raise RowError(f"`responses` must be a list, found {type_name(responses)}")
    if not responses:
        raise RowError("`responses` is empty; expected at least one response")
    scores = _parse_ratings(row, len(responses))
    named = {f"responses[{index}]": response for index, response in enumerate(responses)}
    prompt, turns = _join(row, {name: parse_turns(response, name) for name, response in named.items()})
    return PreferenceRow(prompt, turns, scores=scores)


def _parse_ratings(row: dict[str, Any], num_responses: int) -> tuple[float | None, ...] | None:
    """Scores as they stand, or ranks (1 is the best) as scores: the smaller the rank, the higher."""
    if "ranks" not in row:
        return _parse_numbers(row["scores"], "scores", num_responses) if "scores" in row else None
    if "scores" in row:
        raise RowError("found both `scores` and `ranks`; keep one of the two")
    ranks = _parse_numbers(row["ranks"], "ranks", num_responses)
    return tuple(None if rank is None else -rank for rank in ranks)


def _parse_numbers(values: object, name: str, num_responses: int) -> tuple[float | None, ...]:
    if not isinstance(values, list):
        raise RowError(f"`{name}` must be a list of numbers or nulls, found {type_name(values)}")
    if len(values) != num_responses:
        raise RowError(f"`{name}` has {len(values)} entries for {num_responses} responses; expected one per response")
    return tuple(
        None if value is None else _parse_number(value, f"{name}[{index}]") for index, value in enumerate(values)
    )


def _parse_number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"`{name}` must be a number or null, found {type_name(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(f"`{name}` is {number}; expected a finite number, or null for unrated")
    return number


def _join(
    row: dict[str, Any], responses: dict[str, str | tuple[Message, ...]]
) -> tuple[str | tuple[Message, ...] | None, tuple[str | tuple[Message, ...], ...]]:
    """Bring prompt and responses to one form: all text, or all messages."""
    texts = tuple(response for response in responses.values() if isinstance(response, str))
    conversations = tuple(response for response in responses.values() if not isinstance(response, str))
    prompt = row.get("prompt")
    if isinstance(prompt, (dict, list)):
        return _join_messages(parse_messages(prompt, "prompt"), responses)
    if texts and conversations:
        raise RowError(f"{' and '.join(f'`{name}`' for name in responses)} mix strings and messages; use one form")
    if prompt is None:
        return (None, texts) if texts else _split_conversations(conversations)
    if not isinstance(prompt, str):
        raise RowError(f"`prompt` must be a string or a list of messages, found {type_name(prompt)}")
    prompt = parse_text(prompt, "prompt", may_be_empty=True)
    return (prompt, texts) if texts else _join_text_prompt(prompt, conversations)


def _join_messages(
    prompt: tuple[Message, ...], responses: dict[str, str | tuple[Message, ...]]
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    turns = []
    for response in responses.values():
        if isinstance(response, str):
            response = ({"role": "assistant", "content": response},)
        # Some published sets repeat the prompt inside each response.
        if len(response) > len(prompt) and response[: len(prompt)] == prompt:
            response = response[len(prompt) :]
        turns.append(response)
    return prompt, tuple(turns)


def _join_text_prompt(
    prompt: str, conversations: tuple[tuple[Message, ...], ...]
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    if all(conversation[0]["role"] == "assistant" for conversation in conversations):
        return ({"role": "user", "content": prompt},), conversations
    shared, turns = _split_conversations(conversations)
    if shared[-1]["content"] != prompt:
        raise RowError(
            "`prompt` is a string that is not the last message that the responses' conversations share; "
            "leave `prompt` out, or let the responses start with the assistant's message"
        )
    return shared, turns


def _split_conversations(
    conversations: tuple[tuple[Message, ...], ...],
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    """Take the common leading messages as the prompt."""
    num_shared = 0
    for messages in zip(*conversations, strict=False):
        if any(message != messages[0] for message in messages):
            break
        num_shared += 1
    if num_shared == 0:
        raise RowError("the responses share no leading message, so there is no prompt; add a `prompt` field")
    if any(len(conversation) == num_shared for conversation in conversations):
        raise RowError("a response is empty: one conversation is the beginning of another; add a `prompt` field")
    return conversations[0][:num_shared], tuple(conversation[num_shared:] for conversation in conversations)
