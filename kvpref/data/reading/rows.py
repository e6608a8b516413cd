"""Rows of the shapes that preference data comes in, checked and brought to one form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvpref.data.reading.columns import (
    IMAGE_COLUMNS,
    ROW_FIELDS,
    PromptColumn,
    find_prompt,
    find_system,
    refuse_media,
    template_settings,
    without_nulls,
)
from kvpref.data.reading.images.parts import find_images, place_images
from kvpref.data.reading.images.values import ImageValue
from kvpref.data.reading.messages import RowError, parse_turns, type_name
from kvpref.data.reading.prompts import Turns, join_prompt

EXPECTED_SHAPES = "{prompt, chosen, rejected}, {chosen, rejected} or {prompt, responses, scores or ranks}"


@dataclass(frozen=True)
class PreferenceRow:
    """One row, checked, with its responses in one list.

    Args:
        prompt: A text, a non-empty tuple of messages, or None where the prompt is what the texts have in common.
        responses: Texts, or (exactly where the prompt is messages) non-empty tuples of messages.
        scores: One float or None per response, or None.
        labels: (True, False) for a chosen/rejected pair, otherwise None.
        columns: Extra fields that were asked for, without nulls inside objects.
        template_settings: Keyword arguments for the chat template, such as ``tools``.
        ranks: In place of scores: one float (1 is the best) or None per response, or None.
        images: Those of the prompt, in the order of its image parts, not yet checked.
        prompt_column: Where the prompt comes from, if from another column than `prompt`.
        unread: The names of the row's other fields, which nothing reads.
        is_asked_by_user: Whether the prompt was a text, and became a message since the row has images.
    """

    prompt: Turns | None
    responses: tuple[Turns, ...]
    scores: tuple[float | None, ...] | None = None
    labels: tuple[bool, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    template_settings: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[float | None, ...] | None = None
    images: tuple[ImageValue, ...] = ()
    prompt_column: str | None = field(default=None, compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)
    is_asked_by_user: bool = field(default=False, compare=False)


def parse_row(value: object, columns: AbstractSequence[str] = ()) -> PreferenceRow:
    """Check one decoded row. A field that is null counts as missing; what is not read is listed in the result.

    Args:
        value: What was decoded.
        columns: Extra fields to keep, of any type.

    Raises:
        RowError: If the row has none of the known shapes, lacks one of the columns, or holds what would be lost.
    """
    if not isinstance(value, dict):
        raise RowError(f"expected a JSON object, found {type_name(value)}")
    row = without_nulls(value)
    for name in columns:
        if name not in row:
            raise RowError(f"missing column `{name}`, which the loss reads; found {', '.join(map(str, row)) or 'none'}")
    refuse_media(row)
    prompt = find_prompt(row)
    parsed = _parse_shape(row, prompt)
    settings = template_settings(row)
    if settings and not isinstance(parsed.prompt, tuple):
        name = "tools" if "tools" in settings else "chat_template_kwargs"
        raise RowError(f"`{name}` is for the chat template, and the row is plain text; write the prompt as messages")
    placed, images = place_images(parsed.prompt, parsed.responses, find_images(row))
    return replace(
        parsed,
        prompt=placed,
        images=images,
        columns={name: row[name] for name in columns},
        template_settings=settings,
        prompt_column=None if prompt.name == "prompt" else prompt.name,
        unread=_unread(value, row, {*columns, *prompt.read, *_ALWAYS_READ, *_shape_columns(parsed)}),
    )


_ALWAYS_READ = ("system", "tools", "chat_template_kwargs", *IMAGE_COLUMNS)


def _shape_columns(row: PreferenceRow) -> tuple[str, ...]:
    return ("responses", "scores", "ranks") if row.labels is None else ("chosen", "rejected")


def _unread(value: dict[str, Any], row: dict[str, Any], read: set[str]) -> tuple[str, ...]:
    # A table has each column in every row: one that we know and that is null or empty here is not lost here.
    return tuple(str(name) for name in value if name not in read and (row.get(name) or name not in ROW_FIELDS))


def _parse_shape(row: dict[str, Any], prompt: PromptColumn) -> PreferenceRow:
    is_pair = "chosen" in row or "rejected" in row
    if is_pair and "responses" in row:
        raise RowError("found both `responses` and `chosen`/`rejected`; keep one of the two")
    if not is_pair:
        return _parse_group(row, prompt)
    for name in ("chosen", "rejected"):
        if name not in row:
            raise RowError(f"missing field `{name}`; expected {EXPECTED_SHAPES}")
    responses = {name: parse_turns(row[name], name) for name in ("chosen", "rejected")}
    if responses["chosen"] == responses["rejected"]:
        raise RowError("`chosen` and `rejected` are the same, so the pair holds no preference")
    joined, turns = join_prompt(prompt, find_system(row), responses)
    return PreferenceRow(joined, turns, labels=(True, False))


def _parse_group(row: dict[str, Any], prompt: PromptColumn) -> PreferenceRow:
    for name, is_there in (("responses", "responses" in row), ("prompt", prompt.value is not None)):
        if not is_there:
            raise RowError(f"missing field `{name}`; expected {EXPECTED_SHAPES}")
    responses = row["responses"]
    if not isinstance(responses, list):
        raise RowError(f"`responses` must be a list, found {type_name(responses)}")
    if not responses:
        raise RowError("`responses` is empty; expected at least one response")
    if "scores" in row and "ranks" in row:
        raise RowError("found both `scores` and `ranks`; keep one of the two")
    scores, ranks = (_parse_numbers(row[name], name, len(responses)) if name in row else None for name in _RATINGS)
    named = {f"responses[{index}]": response for index, response in enumerate(responses)}
    turns = {name: parse_turns(response, name) for name, response in named.items()}
    joined, parsed = join_prompt(prompt, find_system(row), turns)
    return PreferenceRow(joined, parsed, scores=scores, ranks=ranks)


_RATINGS = ("scores", "ranks")


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
