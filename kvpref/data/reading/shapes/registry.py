"""All shapes in the order in which they are tried."""

from __future__ import annotations

from kvpref.data.reading.messages import MissingFieldError, RowError
from kvpref.data.reading.shapes.found import Converter, FoundResponses, Row
from kvpref.data.reading.shapes.lists import rated_objects, responses_and_scores
from kvpref.data.reading.shapes.pairs import (
    chosen_and_rejected,
    messages_and_rejected,
    messages_chosen_and_rejected,
    response_and_rejected,
    two_outputs,
)
from kvpref.data.reading.shapes.singles import messages_and_label, prompt_and_completion, text

CONVERTERS: tuple[Converter, ...] = (
    messages_chosen_and_rejected,
    chosen_and_rejected,
    messages_and_rejected,
    response_and_rejected,
    responses_and_scores,
    rated_objects,
    two_outputs,
    prompt_and_completion,
    messages_and_label,
    text,
)
"""The converters; the first one that recognises a row reads it."""

EXPECTED_SHAPES = (
    "{prompt, chosen, rejected}, {chosen, rejected}, {prompt, responses, scores or ranks}, {prompt, completion, label "
    "or score}, {id, trajectories}, {messages, response, id, score}, or one of docs/formats.md; other names: --column "
    "prompt=NAME"
)


def find_responses(row: Row) -> FoundResponses:
    """The responses of a row, by the first shape that matches.

    Raises:
        RowError: If no shape matches, or something is wrong in the one that does.
    """
    is_pair = "chosen" in row or "rejected" in row
    if is_pair and "responses" in row:
        raise RowError("found both `responses` and `chosen`/`rejected`; keep one of the two")
    for name in ("chosen", "rejected"):
        if is_pair and name not in row:
            raise MissingFieldError(f"missing field `{name}`; expected {EXPECTED_SHAPES}")
    for converter in CONVERTERS:
        found = converter(row)
        if found is not None:
            return found
    names = ", ".join(f"`{name}`" for name in row) or "none"
    raise MissingFieldError(f"missing field `responses`; expected {EXPECTED_SHAPES}; found {names}")
