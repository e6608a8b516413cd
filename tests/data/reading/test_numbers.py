"""Numbers of rows."""

from __future__ import annotations

import pytest

from kvpref.data.reading.messages import RowError
from kvpref.data.reading.numbers import check_finite, parse_number


def test_whole_and_other_numbers_are_taken() -> None:
    assert parse_number(2, "score") == 2.0
    assert parse_number(-0.5, "score") == -0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "`score` must be a number or null, found boolean"),
        ("1", "`score` must be a number or null, found string"),
        (float("nan"), "`score` is nan; expected a finite number, or null"),
        (10**400, "`score` is inf"),
    ],
)
def test_others_are_refused(value: object, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_number(value, "score")


def test_null_is_not_suggested_where_it_is_not_taken() -> None:
    with pytest.raises(RowError, match="`score` must be a number, found null"):
        parse_number(None, "score", may_be_null=False)


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        (float("nan"), "`advantages` is nan"),
        ([0.5, float("-inf")], r"`advantages\[1\]` is -inf"),
        ([[0.5], [1, float("inf")]], r"`advantages\[1\]\[1\]` is inf"),
    ],
)
def test_a_column_with_an_entry_that_is_not_finite_is_refused(value: object, entry: str) -> None:
    with pytest.raises(RowError, match=entry):
        check_finite(value, "advantages")


def test_columns_of_all_other_kinds_are_left_to_the_loss() -> None:
    check_finite([[0.5, None], "nan", 10**400, {"weight": 1.0}], "notes")
