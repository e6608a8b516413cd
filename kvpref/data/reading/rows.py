"""Rows of the shapes that preference data comes in, checked and brought to one form."""

from __future__ import annotations

import json
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
from kvpref.data.reading.messages import MissingFieldError, RowError, parse_turns, type_name
from kvpref.data.reading.numbers import check_finite
from kvpref.data.reading.prompts import Turns, join_prompt
from kvpref.data.reading.shapes.found import FoundResponses
from kvpref.data.reading.shapes.history import HISTORY_NOTICE, with_history
from kvpref.data.reading.shapes.registry import EXPECTED_SHAPES, find_responses


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
        names: What errors call the responses; their columns' names, in backticks.
        is_single: Whether the row holds one response, and other rows may hold others to the same prompt.
        rated_by: Of such a row, the column of its score, or None.
        notices: What was done that may surprise, for the report.
        num_rows: How many rows of the data it was made of.
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
    names: tuple[str, ...] = field(default=(), compare=False)
    is_single: bool = field(default=False, compare=False)
    rated_by: str | None = field(default=None, compare=False)
    notices: tuple[str, ...] = field(default=(), compare=False)
    num_rows: int = field(default=1, compare=False)

    def contradiction(self) -> tuple[str, str] | None:
        """The names of two responses that are the same and rated differently, if there are any."""
        ratings = self.scores or self.ranks or ()
        seen: dict[str, int] = {}
        for index, (response, rating) in enumerate(zip(self.responses, ratings, strict=False)):
            if rating is None:
                continue
            text = response if isinstance(response, str) else json.dumps(response, sort_keys=True, default=repr)
            earlier = seen.setdefault(text, index)
            if ratings[earlier] != rating:
                return self.names[earlier], self.names[index]
        return None


def parse_row(value: object, columns: AbstractSequence[str] = (), group_by: str | None = None) -> PreferenceRow:
    """Check one decoded row. A field that is null counts as missing; what is not read is listed in the result.

    Args:
        value: What was decoded.
        columns: Extra fields to keep, of any type.
        group_by: The field that rows of one response are gathered by, which is read elsewhere.

    Raises:
        RowError: If the row has none of the known shapes, lacks one of the columns, or holds what would be lost.
    """
    if not isinstance(value, dict):
        raise RowError(f"expected a JSON object, found {type_name(value)}")
    row = without_nulls(value)
    for name in columns:
        if name not in row:
            found_names = ", ".join(map(str, row)) or "none"
            raise MissingFieldError(f"missing column `{name}`, which the loss reads; found {found_names}")
        check_finite(row[name], name)
    refuse_media(row)
    find_prompt(row)  # refuses columns that might both be it, whatever the shape
    found = find_responses(row)
    own = found.prompt or find_prompt(row)
    prompt = with_history(own, row)
    parsed = _build(row, found, prompt)
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
        unread=(
            *_unread(value, row, {*columns, *prompt.read, *_ALWAYS_READ, *found.read, group_by}),
            *found.unread,
        ),
        notices=(*parsed.notices, *([] if prompt is own else [HISTORY_NOTICE])),
    )


_ALWAYS_READ = ("system", "tools", "chat_template_kwargs", *IMAGE_COLUMNS)


def _unread(value: dict[str, Any], row: dict[str, Any], read: set[str | None]) -> tuple[str, ...]:
    # A table has each column in every row: one that we know and that is null or empty here is not lost here.
    empty: tuple[Any, ...] = (None, "", [], {})
    return tuple(
        str(name) for name in value if name not in read and (row.get(name) not in empty or name not in ROW_FIELDS)
    )


def _build(row: dict[str, Any], found: FoundResponses, prompt: PromptColumn) -> PreferenceRow:
    """Prompt and responses, checked and in one form."""
    if prompt.value is None and found.labels is None:
        raise MissingFieldError(f"missing field `prompt`; expected {EXPECTED_SHAPES}")
    responses = {name: parse_turns(value, name) for name, value in found.responses.items()}
    _refuse_equal(found, tuple(responses.values()))
    joined, turns = join_prompt(prompt, find_system(row), responses)
    _refuse_equal(found, turns)  # a text and a message may say the same
    return PreferenceRow(
        joined,
        turns,
        scores=found.scores,
        labels=found.labels,
        ranks=found.ranks,
        names=tuple(f"`{name}`" for name in responses),
        is_single=found.is_single,
        rated_by=found.rated_by,
        notices=() if found.notice is None else (found.notice,),
    )


def _refuse_equal(found: FoundResponses, responses: tuple[Turns, ...]) -> None:
    if found.labels is not None and responses[0] == responses[1]:
        better, worse = found.responses
        raise RowError(f"`{better}` and `{worse}` are the same, so the pair holds no preference")
