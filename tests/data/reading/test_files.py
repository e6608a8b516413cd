"""Every source gives the same rows, each with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from kvpref.data.reading.files import read_rows, source_files, source_folder
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
    path = tmp_path / "rows.xlsx"
    path.write_text("prompt,chosen\n")
    with pytest.raises(InputError, match=r"\.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.parquet, \.arrow, \.feather"):
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
    assert [row.value for row in read_rows(f"{tmp_path}/both", split="test[:1]")] == FIELDS[1:]
    assert [row.value for row in read_rows(f"{tmp_path}/one:[:1]")] == FIELDS[:1]
    with pytest.raises(InputError, match="there is no split 'dev'; name one of train, test"):
        list(read_rows(f"{tmp_path}/both:dev"))
    datasets.DatasetDict(test=test).save_to_disk(tmp_path / "only")
    assert [row.value for row in read_rows(str(tmp_path / "only"))] == FIELDS[1:]
    datasets.DatasetDict(a=test, b=test).save_to_disk(tmp_path / "neither")
    with pytest.raises(InputError, match="several splits and no train; name one of a, b"):
        list(read_rows(str(tmp_path / "neither")))


def test_dataset_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    assert [row.value for row in read_rows(str(folder))] == PAIRS


def test_folder_without_data(tmp_path: Path):
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match="neither files"):
        list(read_rows(str(tmp_path)))


@pytest.mark.parametrize("name", ["rows.jsonl.bz2", "rows.zip", "rows.parquet.gz", "rows.gz"])
def test_other_packed_files_are_to_be_unpacked(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(b"x")
    with pytest.raises(InputError, match=rf"{name}: a packed file that is not read; unpack it"):
        list(read_rows(str(path)))


def write_lines(path: Path, *rows: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("[:2]", [0, 1]),
        (":[2:4]", [2, 3]),
        (":train[-2:]", [8, 9]),
        (":train[10%:25%]", [1]),
        (":train", range(10)),
        ("[5:100]", range(5, 10)),
    ],
)
def test_slices_of_files_patterns_and_rows_in_memory(tmp_path: Path, part: str, expected):
    rows = [{"prompt": str(number)} for number in range(10)]
    path = write_lines(tmp_path / "a.jsonl", *rows[:6])
    write_lines(tmp_path / "b.jsonl", *rows[6:])
    whole = write_lines(tmp_path / "whole" / "rows.jsonl", *rows)
    chosen = [rows[number] for number in expected]
    found = list(read_rows(whole + part))
    assert [row.value for row in found] == chosen
    assert [row.location for row in found] == [f"{whole}:{number + 1}" for number in expected]
    split = part.removeprefix(":")
    for data in (f"{tmp_path}/*.jsonl", rows):
        assert [row.value for row in read_rows(data, split=split)] == chosen
    places = [path if number < 6 else str(tmp_path / "b.jsonl") for number in expected]
    assert [row.location.rpartition(":")[0] for row in read_rows(f"{tmp_path}/?.jsonl{part}")] == places


@pytest.mark.parametrize("part", ["[:0]", "[5:5]", "[7:]", "[:1%]", "[-1:0]"])
def test_an_empty_slice_is_refused_with_the_number_of_rows(tmp_path: Path, part: str):
    datasets = pytest.importorskip("datasets")
    path = write_lines(tmp_path / "a.jsonl", *PAIRS)
    pattern = f"{tmp_path}/*.jsonl"
    for data, name in [
        (path, path),
        (pattern, pattern),
        (PAIRS, "the rows given"),
        (datasets.Dataset.from_list(PAIRS), "the dataset"),
    ]:
        with pytest.raises(InputError) as caught:
            list(read_rows(data, split=part))
        assert str(caught.value) == f"{name}: the slice {part} of {len(PAIRS)} rows is empty; give one that holds some"
    assert not list(read_rows([], split=part))  # which loading refuses as empty data


def test_nothing_behind_a_slice_is_read(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(b"not packed")

    def rows():
        yield {"prompt": "a"}
        raise AssertionError("one row too many")

    assert len(list(read_rows(rows(), split="[:1]"))) == 1
    assert len(list(read_rows(f"{tmp_path}/*[:1]"))) == 1
    with pytest.raises(InputError, match="damaged"):
        list(read_rows(f"{tmp_path}/*[:2]"))


def test_a_file_is_one_split(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", *PAIRS)
    for text, split in ((f"{path}:test", None), (path, "test[:1]"), (f"{tmp_path}/*.jsonl:dev", None)):
        with pytest.raises(InputError, match=r"is one split, train, and has no '(test|dev)'"):
            list(read_rows(text, split=split))


def test_rows_of_a_dict_of_splits_in_memory():
    data = {"test": PAIRS[:1], "dev": PAIRS[1:]}
    assert [row.value for row in read_rows(data, split="dev[:1]")] == PAIRS[1:]
    with pytest.raises(InputError, match="a dict of test, dev; take one"):
        list(read_rows(data, split="train"))


def test_a_folder_names_its_files_in_locations_and_has_splits(tmp_path: Path):
    one = write_lines(tmp_path / "data" / "train-2.jsonl", PAIRS[1])
    two = write_lines(tmp_path / "data" / "train-1.jsonl", PAIRS[0])
    three = write_lines(tmp_path / "data" / "dev.jsonl", *PAIRS)
    assert locations(str(tmp_path)) == [f"{two}:1", f"{one}:1"]
    assert locations(f"{tmp_path}:validation[1:]") == [f"{three}:2"]
    assert source_files(str(tmp_path)) == [Path(two), Path(one)]
    assert source_files(str(tmp_path), "validation") == [Path(three)]
    with pytest.raises(InputError, match=r"no split 'test'; name one of validation, train"):
        list(read_rows(str(tmp_path), split="test"))
    bad = write_lines(tmp_path / "data" / "train-3.jsonl")
    Path(bad).write_text("{")
    (error,) = [row for row in read_rows(str(tmp_path)) if row.error]
    assert error.location == f"{bad}:1"


def test_files_of_different_kinds_are_refused(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", *PAIRS)
    (tmp_path / "b.csv").write_text("prompt\na\n")
    for data in (str(tmp_path), f"{tmp_path}/*"):
        with pytest.raises(InputError, match=r"kinds: JSON lines \(a\.jsonl\) and CSV \(b\.csv\); name those"):
            list(read_rows(data))


def test_pattern_without_match(tmp_path: Path):
    with pytest.raises(InputError, match="no file matches; check the pattern"):
        list(read_rows(f"{tmp_path}/**/*.jsonl"))


def test_folders_of_relative_paths(tmp_path: Path):
    path = write_lines(tmp_path / "data" / "a.jsonl", *PAIRS)
    assert source_folder(path) == source_folder(f"{path}:train[:1]") == tmp_path / "data"
    assert source_folder(f"{tmp_path}/data/*.jsonl") == source_folder(f"{tmp_path}/data:[:1]") == tmp_path / "data"
    assert source_folder(f"{tmp_path}/**/*.jsonl[:1]") == tmp_path
    assert source_folder("owner/name:train") == source_folder(PAIRS) == Path()


def test_a_card_that_lists_files_is_left_to_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    write_lines(folder / "data" / "x.jsonl", PAIRS[0])
    write_lines(folder / "data" / "y.jsonl", PAIRS[1])
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: best\n    path: data/y.jsonl\n---\n"
    (folder / "README.md").write_text(card)
    assert [row.value for row in read_rows(str(folder))] == FIELDS[1:]
    assert locations(f"{folder}:best") == [f"{folder}:best:row 1"]
