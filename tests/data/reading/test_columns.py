"""Extra columns: kept by name from every source, through storage, selection and truncation."""

from __future__ import annotations

import json
import pickle
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

import kvpref
from kvpref.data import DataOptions, PreferenceDataset, load_preferences
from kvpref.errors import InputError
from kvpref.losses import as_loss

ROWS = [
    {"prompt": "hello", "chosen": " world", "rejected": " fox", "weight": 0.5, "step_rewards": [[1.0], [0.0, 2.0]]},
    {"prompt": "the", "chosen": " dog", "rejected": " fox", "weight": 2, "step_rewards": [[], [3.5]], "other": 1},
]
COLUMNS = DataOptions(columns=("weight", "step_rewards"))


def expected(row: dict) -> dict:
    return {name: row[name] for name in COLUMNS.columns}


@pytest.fixture
def write_source(tmp_path, write_jsonl):
    """The same rows as JSON lines, JSON, Parquet or a saved dataset."""

    def write(kind: str) -> str:
        if kind == "jsonl":
            return write_jsonl(*ROWS)
        path = tmp_path / f"rows.{kind}"
        if kind == "json":
            path.write_text(json.dumps(ROWS))
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        else:
            datasets.Dataset.from_list(ROWS).save_to_disk(path)
        return str(path)

    return write


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "dataset"])
def test_named_columns_are_kept_and_others_are_not(tokenizer, write_source, kind):
    groups = load_preferences(write_source(kind), tokenizer, COLUMNS)
    assert [dict(group.columns) for group in groups] == [expected(row) for row in ROWS]
    assert all(not group.columns for group in load_preferences(write_source(kind), tokenizer))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_a_column_that_no_row_has_is_named_with_the_first_row(tokenizer, write_source, kind):
    with pytest.raises(InputError, match=r"(:1|:row 1): missing column `length`, which the loss reads; found prompt, "):
        load_preferences(write_source(kind), tokenizer, DataOptions(columns=("length",)))


@pytest.mark.parametrize("value", [{}, {"weight": None}], ids=["absent", "null"])
def test_a_row_without_the_column_is_a_bad_row(tokenizer, write_jsonl, value):
    pair = {name: ROWS[0][name] for name in ("prompt", "chosen", "rejected")}
    path = write_jsonl(ROWS[0], pair | value, ROWS[1])
    with pytest.raises(InputError, match=r"rows\.jsonl:2: missing column `weight`.*--on-bad-row skip"):
        load_preferences(path, tokenizer, DataOptions(columns=("weight",)))
    groups = load_preferences(path, tokenizer, DataOptions(columns=("weight",), on_bad_row="skip"))
    assert [group.columns["weight"] for group in groups] == [0.5, 2]
    assert groups.report is not None
    assert [bad.location for bad in groups.report.bad_rows] == [f"{path}:2"]


@pytest.mark.parametrize("columns", ["weight", ("weight", ""), (3,)])
def test_columns_must_be_names(columns):
    with pytest.raises(InputError, match="columns must be a list of names"):
        DataOptions(columns=columns)


def group(**columns) -> kvpref.Group:
    sequences = [kvpref.Sequence.from_prompt_and_response([1, 2], list(range(3, 5 + size))) for size in range(2)]
    return kvpref.Group(sequences, labels=[True, False], id="made:1", columns=columns)


VALUES = {
    "number": 1.5,
    "integers": [1, 2],
    "floats": [0.1, -2.0],
    "mixed": [1, 2.5],
    "flags": [True, False],
    "tokens": [[0.25, 1.0], [1.0, 2.0, 3.0]],
    "text": "a",
    "object": {"a": [1.0, None]},
    "empty": [],
}


def test_values_of_any_type_come_back_as_they_were():
    dataset = PreferenceDataset([group(**VALUES), group()])
    for stored in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert [dict(item.columns) for item in stored] == [VALUES, {}]
        # 1 == True == 1.0: what the values are shows only in writing.
        assert json.dumps(dict(stored[0].columns)) == json.dumps(VALUES)


def test_a_number_per_token_takes_about_eight_bytes():
    rows = [[float(index) / 7 for index in range(5000)] for _ in range(2)]
    packed = len(pickle.dumps(PreferenceDataset([group(logps=rows)])))
    assert packed - len(pickle.dumps(PreferenceDataset([group()]))) < 10000 * 8 + 1000


def test_columns_change_the_fingerprint_and_their_order_does_not():
    def fingerprint(**columns) -> str:
        return PreferenceDataset([group(**columns)]).fingerprint

    assert fingerprint(a=1.0, b=[2.0, 3.0]) == fingerprint(b=[2.0, 3.0], a=1.0)
    assert len({fingerprint(), fingerprint(a=1.0), fingerprint(a=2.0), fingerprint(b=1.0)}) == 4


def test_taking_sequences_takes_what_is_theirs():
    dataset = PreferenceDataset([group(weight=0.5, length=[3, 4], tokens=[[1.0, 2.0], [3.0, 4.0, 5.0]])])
    taken = dataset.map_groups(lambda item: item.take([1]))[0]
    assert dict(taken.columns) == {"weight": 0.5, "length": [4], "tokens": [[3.0, 4.0, 5.0]]}
    assert taken.labels == (False,)


def test_columns_reach_the_batch_as_numbers():
    batch = kvpref.collate(
        list(PreferenceDataset([group(weight=0.5, length=[3, 4], tokens=[[1.0, 2.0], [3.0, 4.0, 5.0]])]))
    )
    assert batch.column("weight") == [0.5]
    torch.testing.assert_close(batch.sequence_column("weight"), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(batch.sequence_column("length"), torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(batch.token_column("tokens"), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))


@pytest.mark.parametrize("entry", ["noun", None, [1.0]])
def test_a_column_of_something_else_per_token(entry):
    """It is no numbers, which `token_column` says; a loss that reads it as it stands gets it."""
    batch = kvpref.collate([group(tags=[[entry] * 2, [entry] * 3])])
    found = re.escape(repr(entry))
    with pytest.raises(InputError, match=f"column 'tags' must hold one number per scored token .* 0; found {found}"):
        batch.token_column("tags")

    @kvpref.loss(columns=["tags"])
    def user_loss(policy, reference, batch):
        raise NotImplementedError

    as_loss(user_loss).prepare_batch(batch)
    assert batch.column("tags") == [[[entry] * 2, [entry] * 3]]


def test_a_number_per_token_of_a_response_that_is_cut(tokenizer, write_jsonl):
    # Every row: " dog" is one token and EOS; the other response is cut from three tokens to two.
    row = {"prompt": "the", "responses": [" dog", " dog dog"], "scores": [1, 0]}
    lengths = [[0.0] * 2, [0.0] * 3]
    whole = write_jsonl(row | {"old_logps": lengths})
    assert load_preferences(whole, tokenizer, DataOptions(columns=("old_logps",)))[0].columns["old_logps"] == lengths
    options = DataOptions(columns=("old_logps",), max_response_tokens=2)
    path = write_jsonl(row | {"old_logps": [[0.0] * 2] * 2}, row | {"old_logps": lengths}, name="cut.jsonl")
    with pytest.raises(InputError, match=r"cut\.jsonl:2: column `old_logps` .* 3 tokens of response 1, .* cut to 2"):
        load_preferences(path, tokenizer, options)
    # Columns that are not by token do not mind.
    path = write_jsonl(row | {"weight": [1.0, 2.0], "name": "a"}, name="other.jsonl")
    columns = DataOptions(columns=("weight", "name"), max_response_tokens=2)
    assert load_preferences(path, tokenizer, columns)[0].columns == {"weight": [1.0, 2.0], "name": "a"}


def test_without_columns_a_row_is_loaded_as_before(tokenizer, write_jsonl):
    with_extra, without = (
        load_preferences(write_jsonl(*rows, name=name), tokenizer)
        for name, rows in (
            ("extra.jsonl", ROWS),
            ("bare.jsonl", [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in ROWS]),
        )
    )
    assert with_extra.fingerprint == without.fingerprint


def test_a_column_with_an_entry_for_tokens_that_are_not_scored_is_refused(build_tokenizer, chat_template, write_jsonl):
    tokenizer = build_tokenizer(chat_template=chat_template)
    turns = [{"role": role, "content": "hello"} for role in ("assistant", "tool", "assistant")]
    row = {"prompt": [{"role": "user", "content": "fox"}], "responses": [turns]}
    options = DataOptions(columns=("logps",))
    [sequence] = load_preferences(write_jsonl(row), tokenizer)[0].sequences
    num_scored, start = sum(sequence.scored), sequence.scored.index(True)
    path = write_jsonl(row | {"logps": [[-1.0] * num_scored]})
    batch = kvpref.collate(list(load_preferences(path, tokenizer, options)))
    assert batch.token_column("logps").tolist() == [-1.0] * num_scored
    num_tokens = len(sequence) - start
    assert num_tokens > num_scored
    path = write_jsonl(row | {"logps": [[-1.0] * num_tokens]})
    match = rf"rows.jsonl:1: column `logps` has an entry for each of the {num_tokens} tokens .* {num_scored} are scored"
    with pytest.raises(InputError, match=match):
        load_preferences(path, tokenizer, options)
