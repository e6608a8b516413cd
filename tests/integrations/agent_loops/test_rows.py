"""Rows that would be read wrongly are refused, by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import agent_rows
import pytest
import torch

from kvpref import InputError
from kvpref.integrations.agent_loops.rows import ResponseRows

Rows = dict[str, Any]


def changed(name: str, row: int, column: int, value: int) -> Callable[[Rows], Rows]:
    def change(rows: Rows) -> Rows:
        rows[name][row, column] = value
        return rows

    return change


def with_values(**values: Callable[[torch.Tensor], Any]) -> Callable[[Rows], Rows]:
    return lambda rows: {**rows, **{name: make(rows["input_ids"]) for name, make in values.items()}}


# Row 1 of these rows, padded on the right, has tokens in columns 0 to 50, the response in 44 to 50.
REFUSED: list[tuple[Callable[[Rows], Rows], str]] = [
    (lambda rows: {"input_ids": rows["input_ids"]}, "attention_mask, response_mask missing, found input_ids"),
    (with_values(input_ids=lambda ids: ids.tolist()), "input_ids must be a padded tensor .* got a list"),
    (with_values(input_ids=lambda ids: ids.int()), "input_ids must be int64; got torch.int32"),
    (with_values(input_ids=lambda ids: ids[0]), r"input_ids must be a padded tensor .* got shape \(56,\)"),
    (with_values(input_ids=lambda ids: ids[:0]), r"got shape \(0, 56\)"),
    (
        with_values(input_ids=lambda ids: torch.nested.nested_tensor([*ids], layout=torch.jagged)),
        "input_ids must be a padded tensor .* got a nested one",
    ),
    (with_values(attention_mask=lambda ids: ids[:, 1:] * 0), "attention_mask must have the shape of input_ids"),
    (with_values(response_mask=lambda ids: ids[1:] * 0), "response_mask must have the shape .* got 4 x"),
    (with_values(response_mask=lambda ids: torch.zeros(5, 99)), "response_mask must have the shape .* got 5 x 99"),
    (changed("attention_mask", 1, 2, 2), "attention_mask must hold zeros and ones; row 1 holds others"),
    (changed("response_mask", 3, 25, -1), "response_mask must hold zeros and ones; row 3 holds others"),
    (changed("attention_mask", 1, 10, 0), "one run of ones per row, padded left or right; row 1 has 2"),
    (lambda rows: {**rows, "attention_mask": rows["attention_mask"] * 0}, "row 0 has 0"),
    (changed("response_mask", 1, 51, 1), "row 1 has ones in response_mask where its attention_mask is 0"),
    (changed("response_mask", 4, 0, 1), "row 4 scores its first token, which no token predicts"),
    (with_values(position_ids=lambda ids: torch.ones_like(ids)), "position_ids must count each row's tokens from 0"),
    (with_values(position_ids=lambda ids: ids[:, None].repeat(1, 3, 1)), "position_ids must have the shape"),
    (with_values(multi_modal_inputs=lambda ids: [{}]), r"rows with images \(multi_modal_inputs\) are not understood"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_the_message_says_what_is_wrong_and_where(change: Callable[[Rows], Rows], message: str) -> None:
    rows = agent_rows.padded(agent_rows.attempts_that_branch())
    ResponseRows.read(rows, 16)
    with pytest.raises(InputError, match=message):
        ResponseRows.read(change(rows), 16)


def test_values_return_to_their_places() -> None:
    rows = agent_rows.padded(agent_rows.calls_that_nest(), "both")
    read = ResponseRows.read(rows, 16)
    places = rows["response_mask"].bool()
    values = torch.arange(1.0, 1 + int(places.sum()))
    assert torch.equal(read.pad(values)[places], values)
    assert not read.pad(values)[~places].any()
    scored = [token for sequence in read.batch.sequences for token in sequence.ids[sequence.flags]]
    assert scored == rows["input_ids"][places].tolist()
