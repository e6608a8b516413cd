"""CSV and TSV: what cells mean, and where bad ones stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvpref.data.reading.files import read_rows
from kvpref.errors import InputError

MESSAGES = [{"role": "user", "content": 'say "hi"\nplease'}]


def rows(path: Path, content: str | bytes) -> list[Any]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(path))


def quoted(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return '"' + text.replace('"', '""') + '"'


def test_text_stays_text_and_other_columns_are_json(tmp_path: Path) -> None:
    content = 'prompt,chosen,rejected,score,label,title\n2+2,4,true,0.5,True,7\n,[1],"{""a"": 1}",,x,\n'
    first, second = rows(tmp_path / "a.csv", content)
    assert first.value == {
        **{"prompt": "2+2", "chosen": "4", "rejected": "true", "score": 0.5},
        **{"label": first.value["label"], "title": "7"},
    }
    assert first.value["label"] in (True, "True")  # text where nothing reads it
    assert second.value["prompt"] is second.value["score"] is second.value["title"] is None
    assert (second.value["chosen"], second.value["rejected"]) == ("[1]", '{"a": 1}')


def test_messages_and_lists(tmp_path: Path) -> None:
    content = f"prompt\tresponses\tscores\n{quoted(MESSAGES)}\t{quoted(['a', MESSAGES])}\t[1, null]\n"
    (row,) = rows(tmp_path / "a.tsv", content)
    assert row.value == {"prompt": MESSAGES, "responses": ["a", MESSAGES], "scores": [1, None]}


def test_rows_are_named_by_their_first_line(tmp_path: Path) -> None:
    content = '\ufeffprompt,chosen\r\n"a\n\nb",c\r\n\r\nd,"e\nf"\r\ng\r\nh,i,j\r\nk,"l"m\r\nn,o\r\n'
    path = tmp_path / "a.csv"
    found = rows(path, content)
    assert [row.location for row in found] == [f"{path}:{line}" for line in (2, 6, 8, 9, 10, 11)]
    assert [row.value for row in found if row.error is None] == [
        {"prompt": "a\n\nb", "chosen": "c"},
        {"prompt": "d", "chosen": "e\nf"},
        {"prompt": "n", "chosen": "o"},
    ]
    errors = [row.error for row in found if row.error is not None]
    assert errors[0].startswith("1 cells in a table of 2 columns")
    assert errors[1].startswith("3 cells in a table of 2 columns")
    assert errors[2].startswith("not valid CSV")


def test_bad_bytes_and_open_quotes(tmp_path: Path) -> None:
    found = rows(tmp_path / "a.csv", b'prompt,chosen\na,"b\n\xff"\nc,d\ne,"f\n')
    assert [row.error for row in found] == [
        "invalid UTF-8 in line 3; save the file as UTF-8",
        None,
        "not valid CSV (unexpected end of data)",
    ]


def test_long_cells_are_read(tmp_path: Path) -> None:
    (row,) = rows(tmp_path / "a.csv", f"prompt\n{'x' * 200_000}\n")
    assert len(row.value["prompt"]) == 200_000


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_messages_as_python_prints_them_are_refused(tmp_path: Path, column: str) -> None:
    (row,) = rows(tmp_path / "a.csv", f"{column}\n{quoted(str(MESSAGES))}\n")
    assert row.error == f"`{column}` holds messages as Python prints them, not JSON; write them with json.dumps"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,prompt\n", "two columns are named 'prompt'"),
        ("a,b\n1,2\n", "no column is named as one that is read .* found a, b"),
        (b"prompt,\xff\n", "invalid UTF-8 in line 1"),
    ],
)
def test_the_first_line_names_the_columns(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"a\.csv:1: {message}"):
        rows(tmp_path / "a.csv", content)


def test_slices_count_rows_and_not_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt\n"a\nb"\n\nc\nd\ne\n')
    assert [row.value["prompt"] for row in read_rows(f"{path}[50%:]")] == ["d", "e"]  # type: ignore[index]
    assert [row.location for row in read_rows(f"{path}[-1:]")] == [f"{path}:7"]
