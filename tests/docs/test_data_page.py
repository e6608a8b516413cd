"""docs/data.md: its rows are rows, its columns are those that are read, and it says what commands say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kvpref.data.reading.columns import PROMPT_COLUMNS, ROW_FIELDS
from kvpref.data.reading.files import _FORMS
from kvpref.data.reading.rows import parse_row
from kvpref.data.reading.sources.csv_files import TEXT_COLUMNS
from kvpref.data.reading.trajectories.calls import parse_call
from kvpref.data.reading.trajectories.rows import parse_trajectories
from kvpref.data.statistics import DATA_SAVING, TOKEN_SAVING

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```json\n(.*?)```", PAGE, flags=re.S)


def test_rows_of_the_page_have_the_shapes_it_says() -> None:
    block, *_ = blocks()
    rows = [parse_row(json.loads(line)) for line in block.splitlines()]
    assert [type(row.prompt).__name__ for row in rows] == ["str", "tuple", "str", "str", "NoneType"]
    assert rows[1].responses[1] == ({"role": "assistant", "content": "5"},)
    assert rows[2].scores == (1.0, 0.0, None)
    assert rows[3].ranks == (1.0, 3.0, 2.0)


def test_rows_of_one_response_are_such() -> None:
    rows = [parse_row(json.loads(line), group_by="problem") for line in blocks()[1].splitlines()]
    assert [(row.is_single, row.rated_by, row.scores) for row in rows] == [
        (True, "label", (1.0,)),
        (True, "label", (0.0,)),
        (True, "score", (0.9,)),
    ]
    assert not any(row.unread for row in rows)


def test_trajectories_of_the_page_are_the_same_in_both_forms() -> None:
    whole, by_call = map(json.loads, blocks()[2:4])
    task = parse_trajectories(whole)
    assert [attempt.score for attempt in task.attempts] == [1, 0]
    (turn,) = task.attempts[0].turns
    (same,) = parse_call(by_call, "here").turns
    assert (turn.history, turn.message) == (same.history, same.message)


def test_weights_of_the_page_fall_on_the_tokens_it_says() -> None:
    row = parse_row(json.loads(blocks()[4]), ("token_weights",))
    assert row.labels == (True, False)
    assert row.columns == {"token_weights": [1, 0.5]}


def test_every_column_and_file_type_is_on_the_page() -> None:
    for name in (*ROW_FIELDS, *_FORMS):
        assert f"`{name}`" in PAGE, name


def test_columns_of_text_in_csv_are_on_the_page() -> None:
    said = " ".join(PAGE.partition("### Cells")[2].split()).partition("In columns of text (")[2].partition(")")[0]
    named = set(re.findall(r"`(\w+)`", said))
    assert named <= TEXT_COLUMNS
    assert TEXT_COLUMNS - named - {*PROMPT_COLUMNS, "chosen_response", "rejected_response"} == set()


def test_savings_are_explained_in_the_words_of_the_commands() -> None:
    flat = " ".join(PAGE.split())
    assert DATA_SAVING in flat
    assert TOKEN_SAVING in flat
