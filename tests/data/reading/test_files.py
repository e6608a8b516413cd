"""Every source gives the same rows, each with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from kvpref.data.reading.files import read_rows
from kvpref.errors import InputError

PAIRS = [
    {"prompt": "hello", "chosen": " world", "rejected": " fox", "source": "x"},
    {"prompt": "the", "chosen": " dog", "rejected": " lazy", "source": "y"},
]
FIELDS = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in PAIRS]


def locations(data: str) -> list[str]:
    return [row.location for row in read_rows(data)]


def test_jsonl_counts_lines_from_one_and_passes_over_blank_ones(write_jsonl):
    path = write_jsonl(PAIRS[0], "", PAIRS[1])
    rows = list(read_rows(path))
    assert [row.value for row in rows] == PAIRS
    assert locations(path) == [f"{path}:1", f"{path}:3"]


def test_jsonl_line_separators_inside_strings_do_not_end_a_line(write_jsonl):
    row = {"prompt": "a\u2028b\x85c", "chosen": "d", "rejected": "e"}
    path = write_jsonl(json.dumps(row, ensure_ascii=False), PAIRS[0])
    assert [row.value for row in read_rows(path)] == [row, PAIRS[0]]


def test_jsonl_with_byte_order_mark_and_crlf(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in PAIRS) + b"\r\n")
    assert [row.value for row in read_rows(str(path))] == PAIRS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": ', "not valid JSON"),
        (b'{"prompt": "\xff"}', "invalid UTF-8 at byte 13"),
        ("[" * 100_000, "not valid JSON"),
        ('{"scores": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_jsonl_undecodable_line_is_an_error_of_that_row_only(write_jsonl, line, reason):
    path = write_jsonl(PAIRS[0], line, PAIRS[1])
    rows = list(read_rows(path))
    assert rows[1].location == f"{path}:2"
    assert rows[1].error is not None
    assert reason in rows[1].error
    assert [row.value for row in (rows[0], rows[2])] == PAIRS


def test_json_list(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(PAIRS, indent=2))
    assert [row.value for row in read_rows(str(path))] == PAIRS
    assert locations(str(path)) == [f"{path}:row 1", f"{path}:row 2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}', ":1: expected a JSON list"),
        (b"[\n{]", ":2: not valid JSON"),
        (b'{"a": 1}\n{"a": 2}', "rename the file to .jsonl"),
        (b'["a",\n"\xff"]', ":2: invalid UTF-8"),
        (b"", ":1: not valid JSON"),
    ],
)
def test_json_that_is_not_a_list(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_rows(str(path)))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_parquet_reads_known_columns_and_counts_rows(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS * 800), path, row_group_size=300)
    rows = list(read_rows(str(path)))
    assert [row.value for row in rows] == FIELDS * 800
    assert [row.location for row in rows] == [f"{path}:row {number}" for number in range(1, 1601)]


def test_parquet_with_an_invalid_string_names_its_row(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    strings = pyarrow.array([b"good", b"\xff", b"fine"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": strings}), path)
    rows = list(read_rows(str(path)))
    assert [row.error is None for row in rows] == [True, False, True]
    assert rows[1].location == f"{path}:row 2"
    assert "invalid UTF-8" in str(rows[1].error)


def test_parquet_without_known_columns_lists_what_there_is(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"]}), path)
    with pytest.raises(InputError, match="found title"):
        list(read_rows(str(path)))


def test_parquet_that_is_none(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR0")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.json", "missing.parquet"])
def test_missing_file(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="no such file"):
        list(read_rows(str(tmp_path / name)))


def test_unknown_file_type_lists_the_known_ones(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen\n")
    with pytest.raises(InputError, match=r"\.jsonl, \.ndjson, \.json, \.parquet, \.arrow, \.feather"):
        list(read_rows(str(path)))


def test_saved_datasets_with_and_without_splits(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    train, test = datasets.Dataset.from_list(PAIRS[:1]), datasets.Dataset.from_list(PAIRS[1:])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert [row.value for row in read_rows(str(tmp_path / "one"))] == FIELDS[:1]
    assert [row.value for row in read_rows(str(tmp_path / "both"))] == FIELDS[:1]
    assert [row.value for row in read_rows(f"{tmp_path}/both:test")] == FIELDS[1:]
    assert locations(f"{tmp_path}/both:test") == [f"{tmp_path}/both:test:row 1"]
    with pytest.raises(InputError, match="':split'"):
        list(read_rows(f"{tmp_path}/both:dev"))


def test_dataset_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    assert [row.value for row in read_rows(str(folder))] == FIELDS


def test_folder_without_data(tmp_path: Path):
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match="neither a file"):
        list(read_rows(str(tmp_path)))
