"""JSON whose objects have a key twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvpref.data import DataOptions, load_preferences
from kvpref.data.reading.files import read_rows
from kvpref.data.reading.json_text import RepeatedKeyError, decode_json
from kvpref.errors import InputError

GOOD = '{"prompt": "the", "chosen": " a", "rejected": " b"}'
TWICE = '{"prompt": "the", "chosen": " a", "prompt": "the", "rejected": " b"}'
INSIDE = '{"prompt": [{"role": "user", "content": "x", "content": "y"}], "chosen": " a", "rejected": " b"}'


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 1}', '[[{"c": {"a": 1, "a": null}}]]'])
def test_a_key_that_stands_twice_is_named(text: str) -> None:
    with pytest.raises(RepeatedKeyError, match="an object has the key `a` twice"):
        decode_json(text)


def test_other_json_is_read_as_ever() -> None:
    value = {"a": [1, 2.5, None, True, "é\\n", {"a": {}, "b": []}]}
    assert decode_json(json.dumps(value)) == value


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "2"), ("a.json", "row 2")])
@pytest.mark.parametrize(("row", "key"), [(TWICE, "prompt"), (INSIDE, "content")])
def test_the_row_is_bad(tokenizer: Any, tmp_path: Path, name: str, place: str, row: str, key: str) -> None:
    path = tmp_path / name
    path.write_text(f"[{GOOD},\n{row},\n{GOOD}]" if name == "a.json" else f"{GOOD}\n{row}\n{GOOD}\n")
    with pytest.raises(InputError, match=f"^{path}:{place}: an object has the key `{key}` twice, .*; keep that one"):
        load_preferences(path, tokenizer)
    found = load_preferences(path, tokenizer, DataOptions(on_bad_row="skip"))
    assert found.group_ids == [f"{path}:{place.replace('2', number)}" for number in ("1", "3")]


def test_cells_of_tables_are_bad_unless_they_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    objects, messages = '{"a": 1, "a": 2}', '[{"role": "user", "content": "x", "content": "y"}]'
    path.write_text(f"prompt\ttools\n{objects}\t\n{messages}\t\nx\t{objects}\n")
    rows = list(read_rows(path))
    assert [row.error and row.error[:35] for row in rows] == [
        None,
        "`prompt`: an object has the key `co",
        "`tools`: an object has the key `a` ",
    ]
