"""The same rows give the same groups and the same notices, whatever they are read from."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from kvpref.data import DataOptions, load_preferences
from kvpref.data.reading.files import read_rows
from kvpref.errors import InputError

TOOL_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}{{ mood | default('') }}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMS = (
    *("jsonl", "json", "parquet", "arrow file", "arrow stream", "feather", "saved", "splits", "in memory", "rows"),
    *("jsonl.gz", "ndjson.zst", "json.gz", "csv", "tsv", "csv.gz", "shards of jsonl.gz", "shards of parquet"),
)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CITY, DAYS = {"type": "string", "enum": ["Rome", None]}, {"type": "integer"}
# By name: rows with all keys in the first, since tables made of rows take its keys.
DATA: dict[str, list[dict[str, Any]]] = {
    "pairs": [
        {"prompt": "hello", "chosen": " world", "rejected": " fox", "system": None, "weight": 0.5, "other": None},
        {"prompt": "the", "chosen": " dog", "rejected": " fox", "system": "be kind", "weight": 2},
        {"prompt": None, "chosen": "hello dog", "rejected": "hello fox", "weight": 1},
    ],
    "scores": [
        {"prompt": "hello", "responses": [" world", " fox", " dog"], "scores": [1, None, 0.5], "weight": 1},
        {"prompt": "the", "responses": [" fox"], "scores": None, "weight": 1},
    ],
    "ranks": [
        {"prompt": "hello", "responses": [" world", " fox", " dog"], "ranks": [2, 1, None], "weight": 1},
        {"prompt": "the", "responses": [" fox", " dog"], "ranks": [1, 2], "weight": 1},
    ],
    "tools": [
        {
            "prompt": [user("hello")],
            "chosen": [call("weather", city="Rome", days=None)],
            "rejected": [call("weather", days=2)],
            "tools": [tool("weather", city=CITY, days=DAYS)],
            "chat_template_kwargs": {"mood": "fox"},
            "images": [],
            "weight": 1,
        },
        {
            "prompt": [user("hello"), call("clock", zone="UTC"), {"role": "tool", "name": "clock", "content": "the"}],
            "chosen": [reply("world")],
            "rejected": [reply("fox")],
            "tools": [tool("clock", zone={"type": "string"})],
            "weight": 1,
        },
        {"prompt": [user("hello")], "chosen": [reply("the")], "rejected": [reply("fox")], "tools": [], "weight": 1},
    ],
    "tools as JSON": [
        {
            "question": [user("hello")],
            "responses": [[reply("the")], [call("weather", city="Rome")]],
            "tools": json.dumps([tool("weather", city=CITY)]),
            "chat_template_kwargs": json.dumps({"mood": "fox"}),
            "weight": {"a": [1.0, None], "b": None},
        },
    ],
    "instructions": [
        {"instruction": "hello", "input": "the fox", "responses": ["world", "dog"], "title": "a", "weight": 1},
        {"instruction": "hello", "input": "", "responses": ["world", "dog"], "title": "b", "weight": 1},
    ],
    "questions": [{"question": "hello", "chosen": " dog", "rejected": " fox", "prompt": None, "weight": 1}],
    "conversations": [
        {"chosen": [user("the"), reply("dog")], "rejected": [user("the"), reply("fox")], "system": "hello", "weight": 1}
    ],
}


def write(form: str, rows: list[dict[str, Any]], folder: Path) -> Any:
    """The rows as a source of some form."""
    path = folder / f"rows.{form.split()[0]}"
    inner, _, packed = form.partition(".")
    if form.startswith("shards of "):
        return write_shards(form.removeprefix("shards of "), rows, folder)
    if packed:
        write_packed(path, Path(write(inner, rows, folder)).read_bytes())
    elif form in ("jsonl", "ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form in ("csv", "tsv"):
        write_cells(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form in ("saved", "splits"):
        saved = datasets.Dataset.from_list(rows)
        (saved if form == "saved" else datasets.DatasetDict(train=saved)).save_to_disk(path)
    elif form in ("in memory", "rows"):
        return datasets.Dataset.from_list(rows) if form == "in memory" else rows
    else:
        write_table(form, pyarrow.Table.from_pylist(rows), path)
    return str(path)


def write_table(form: str, table: Any, path: Path) -> None:
    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif form == "feather":
        pyarrow.feather.write_feather(table, str(path))
    else:
        new_writer = pyarrow.ipc.new_file if form == "arrow file" else pyarrow.ipc.new_stream
        with new_writer(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


def write_packed(path: Path, content: bytes) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    else:
        with pyarrow.output_stream(path, compression="zstd") as file:
            file.write(content)


def write_shards(form: str, rows: list[dict[str, Any]], folder: Path) -> str:
    """A folder of one file per row, read in the order of their names."""
    shards = folder / f"shards of {form}" / "data"
    shards.mkdir(parents=True)
    keys = {key: None for row in rows for key in row}
    for number, row in enumerate(rows):
        alone = Path(write(form, [keys | row], folder))
        alone.rename(shards / f"rows_{number}.{form}")
    return str(shards.parent)


def write_cells(path: Path, rows: list[dict[str, Any]]) -> None:
    def cell(value: Any) -> str:
        return "" if value is None else value if isinstance(value, str) else json.dumps(value)

    keys = list({key: None for row in rows for key in row})
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(keys)
        writer.writerows([cell(row.get(key)) for key in keys] for row in rows)


@pytest.fixture(scope="module")
def tool_tokenizer(build_tokenizer) -> Any:
    return build_tokenizer(chat_template=TOOL_TEMPLATE)


@pytest.mark.parametrize("name", DATA)
def test_every_form_gives_the_same_groups_and_notices(tool_tokenizer, tmp_path: Path, name: str) -> None:
    expected = None
    for form in FORMS:
        found = load_preferences(write(form, DATA[name], tmp_path), tool_tokenizer, DataOptions(columns=("weight",)))
        assert found.report is not None
        if expected is None:
            expected = found
        assert found.fingerprint == expected.fingerprint, form
        assert found.report.notices == expected.report.notices, form
        assert [group.ranks for group in found] == [group.ranks for group in expected]
    assert expected is not None
    assert len(expected) == len(DATA[name])


def test_what_the_template_was_given(tool_tokenizer, tmp_path: Path) -> None:
    for form in ("jsonl", "parquet", "saved"):
        group = load_preferences(write(form, DATA["tools"], tmp_path), tool_tokenizer)[0]
        texts = [tool_tokenizer.decode(sequence.input_ids) for sequence in group.sequences]
        assert '"properties": {"city": {"type": "string", "enum": ["Rome", null]}, "days"' in texts[0]
        assert "}\nfox<|im_start|>user" in texts[0]
        assert '"arguments": {"city": "Rome"}' in texts[0]
        assert '"arguments": {"days": 2}' in texts[1]


def test_places_of_rows(tmp_path: Path) -> None:
    rows = DATA["pairs"]
    places = {form: [row.location for row in read_rows(write(form, rows, tmp_path))] for form in FORMS}
    for form in ("arrow file", "arrow stream", "feather", "parquet"):
        assert places[form] == [f"{tmp_path}/rows.{form.split()[0]}:row {number}" for number in (1, 2, 3)]
    assert places["in memory"] == places["rows"] == ["row 1", "row 2", "row 3"]


def test_a_bad_row_in_memory_is_named(tokenizer) -> None:
    with pytest.raises(InputError, match=r"^row 2: missing field `rejected`.*--on-bad-row skip"):
        load_preferences([DATA["questions"][0], {"prompt": "a", "chosen": "b"}], tokenizer)
    with pytest.raises(InputError, match="the rows given: the data is empty"):
        load_preferences([], tokenizer)


def test_rows_may_be_made_as_they_are_read_and_hold_tuples(tokenizer) -> None:
    rows = [{"prompt": "the", "responses": (" dog", " fox"), "scores": (1, 0)}]
    expected = load_preferences([rows[0] | {"responses": [" dog", " fox"], "scores": [1, 0]}], tokenizer)
    assert load_preferences(iter(rows), tokenizer).fingerprint == expected.fingerprint
    assert load_preferences(datasets.Dataset.from_list(rows).with_format("numpy"), tokenizer)[0] == expected[0]


def test_a_transform_of_a_dataset_is_applied(tokenizer) -> None:
    raw = datasets.Dataset.from_list([{"a": "the", "b": " dog", "c": " fox"}])
    made = raw.with_transform(lambda batch: {"prompt": batch["a"], "chosen": batch["b"], "rejected": batch["c"]})
    expected = load_preferences([{"prompt": "the", "chosen": " dog", "rejected": " fox"}], tokenizer)
    assert load_preferences(made, tokenizer).fingerprint == expected.fingerprint


def test_what_holds_no_rows_is_refused(tokenizer, tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(DATA["questions"])
    for data, message in (
        (datasets.DatasetDict(train=dataset, test=dataset), r"found a DatasetDict of train, test; take one"),
        (dataset.to_iterable_dataset(), "found an IterableDataset, .* load it without streaming"),
        (3, "expected a path, a dataset or a list of rows, found int"),
        ([3], "^row 1: expected a JSON object, found int"),
    ):
        with pytest.raises(InputError, match=message):
            load_preferences(data, tokenizer)  # type: ignore[arg-type]
    (tmp_path / "bad.arrow").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"bad\.arrow: not a readable Arrow file"):
        load_preferences(tmp_path / "bad.arrow", tokenizer)


def test_arrow_with_an_invalid_string_names_its_row(tmp_path: Path) -> None:
    strings = pyarrow.array([b"good", b"\xff", b"fine"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": strings})
    with pyarrow.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    rows = list(read_rows(tmp_path / "rows.arrow"))
    assert [row.error for row in rows] == [None, "invalid UTF-8 in a string column", None]
    assert [row.value for row in rows] == [{"prompt": "good"}, None, {"prompt": "fine"}]
