"""docs/data.md: its rows are rows, its columns are those that are read, and it says what commands say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kvpref.data.reading.columns import ROW_FIELDS
from kvpref.data.reading.files import _READERS
from kvpref.data.reading.rows import parse_row
from kvpref.data.statistics import DATA_SAVING, TOKEN_SAVING

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()


def test_rows_of_the_page_have_the_shapes_it_says() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.S)
    rows = [parse_row(json.loads(line)) for line in block.splitlines()]
    assert [type(row.prompt).__name__ for row in rows] == ["str", "tuple", "str", "str", "NoneType"]
    assert rows[1].responses[1] == ({"role": "assistant", "content": "5"},)
    assert rows[2].scores == (1.0, 0.0, None)
    assert rows[3].ranks == (1.0, 3.0, 2.0)


def test_every_column_and_file_type_is_on_the_page() -> None:
    for name in (*ROW_FIELDS, *_READERS):
        assert f"`{name}`" in PAGE, name


def test_savings_are_explained_in_the_words_of_the_commands() -> None:
    flat = " ".join(PAGE.split())
    assert DATA_SAVING in flat
    assert TOKEN_SAVING in flat
