"""Columns under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from kvpref.data import DataOptions, load_preferences
from kvpref.data.reading.files import read_rows
from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.sources.column_names import ColumnNames
from kvpref.errors import InputError

ROWS = [
    {"prompt": "not this", "ask": "hello", "good": " world", "bad": " fox", "note": 1},
    {"prompt": "nor this", "ask": "the", "good": " dog", "bad": " lazy", "note": 2},
]
NAMES = {"prompt": "ask", "chosen": "good", "rejected": "bad"}


def write(form: str, folder: Path) -> str:
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif form == "csv":
        lines = [",".join(ROWS[0]), *(",".join(map(str, row.values())) for row in ROWS)]
        path.write_text("\n".join(lines) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_groups_and_notices_are_those_of_renamed_rows(tokenizer: Any, tmp_path: Path, form: str) -> None:
    plain = [{name: row[original] for name, original in NAMES.items()} for row in ROWS]
    found = load_preferences(write(form, tmp_path), tokenizer, DataOptions(column_names=NAMES))
    assert found.fingerprint == load_preferences(plain, tokenizer).fingerprint
    assert found.report is not None
    assert found.report.notices == (
        "columns that nothing reads, at least in some rows: `note`, `prompt (replaced by ask)`",
    )


def test_names_may_be_swapped_and_used_twice() -> None:
    swapped = ColumnNames({"chosen": "rejected", "rejected": "chosen"})
    row = swapped.rename(RawRow("a:1", {"chosen": 1, "rejected": 2, "id": 3}))
    assert (row.value, row.left_out) == ({"chosen": 2, "rejected": 1, "id": 3}, ())
    both = ColumnNames({"prompt": "text", "chosen": "text"}).rename(RawRow("a:1", {"text": 1}))
    assert both.value == {"prompt": 1, "chosen": 1}


@pytest.mark.parametrize(
    ("chosen", "score"), [({"score": "rating"}, 2), ({"score": "score"}, 1), ({"label": "good"}, 0), ({}, None)]
)
def test_a_chosen_rating_takes_the_place_of_others(tokenizer: Any, chosen: dict[str, str], score: float | None) -> None:
    row = {"prompt": "the", "completion": " a", "score": 1, "rating": 2, "good": False}
    options = DataOptions(column_names=chosen)
    if score is None:
        with pytest.raises(InputError, match="row 1: `score` is 1 and `rating` 2, and either may be the rating"):
            load_preferences([row], tokenizer, options)
    else:
        assert load_preferences([row], tokenizer, options)[0].scores == (score,)


def test_a_rating_that_the_loss_reads_stays() -> None:
    row = RawRow("a:1", {"good": 1, "score": 2, "rating": 3})
    names = ColumnNames({"label": "good"}, extra=("rating",))
    assert names.rename(row).value == {"label": 1, "rating": 3}
    assert names.rename(row).left_out == ("score (replaced by good)",)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"prompt": "rejected"}, "missing field `rejected`; .*; `rejected` is read as `prompt` [(]--column prompt=rej"),
        ({"input": "chosen"}, "missing field `chosen`; .*; `chosen` is read as `input` [(]--column input=chosen[)]"),
        ({"margin": "note"}, "missing field `rejected`; [^;]*; [^;]*; correct the row"),
    ],
)
def test_a_field_that_was_read_as_another_is_named_where_it_is_missing(
    tokenizer: Any, names: dict[str, str], reason: str
) -> None:
    row: dict[str, Any] = {"prompt": "the", "chosen": " a", "rejected": " b", "note": 1}
    if "margin" in names:
        del row["rejected"]
    options = DataOptions(columns=("margin",) if "margin" in names else (), column_names=names)
    with pytest.raises(InputError, match=f"^row 1: {reason}"):
        load_preferences([row], tokenizer, options)


def test_what_is_no_object_and_bad_rows_stay() -> None:
    names = ColumnNames(NAMES)
    for row in (RawRow("a:1", [1]), RawRow("a:1", error="bad")):
        assert names.rename(row) is row


def test_a_column_that_the_loss_reads_may_have_another_name(tokenizer: Any) -> None:
    rows = [{"prompt": "the", "chosen": " a", "rejected": " b", "difficulty": 3}]
    options = DataOptions(columns=("margin",), column_names={"margin": "difficulty"})
    assert load_preferences(rows, tokenizer, options)[0].columns == {"margin": 3}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_column_that_no_row_has_is_named_with_the_nearest(
    tokenizer: Any, tmp_path: Path, form: str, on_bad_row: Any
) -> None:
    options = DataOptions(column_names=NAMES | {"chosen": "goood"}, on_bad_row=on_bad_row)
    with pytest.raises(InputError, match=r"no row has a column 'goood'; did you mean chosen=good\?"):
        load_preferences(write(form, tmp_path), tokenizer, options)
    options = DataOptions(column_names=NAMES | {"system": "zzz"})
    with pytest.raises(InputError, match=r"no row has a column 'zzz'; there are .*note"):
        load_preferences(write(form, tmp_path), tokenizer, options)


def test_a_name_that_nothing_reads_is_refused() -> None:
    with pytest.raises(InputError, match=r"nothing reads a column named 'promt'; did you mean prompt=ask\?"):
        ColumnNames({"promt": "ask"})


def test_one_of_several_sources_may_lack_an_optional_column(tmp_path: Path, chat_tokenizer: Any) -> None:
    paths = []
    for number, extra in enumerate(({"sys": "be kind"}, {})):
        paths.append(tmp_path / f"{number}.jsonl")
        paths[-1].write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"} | extra) + "\n")
    assert len(load_preferences(paths, chat_tokenizer, DataOptions(column_names={"system": "sys"}))) == 2


def test_tables_decode_what_is_renamed_and_nothing_else(tmp_path: Path) -> None:
    (first, _) = read_rows(write("parquet", tmp_path), ColumnNames(NAMES))
    assert first.value == {"prompt": "hello", "chosen": " world", "rejected": " fox"}
    assert set(first.left_out) == {"note", "prompt (replaced by ask)"}
