"""What the trainer takes as data: groups, or rows in any form with the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from chat_families import build_tokenizer
from preference_runs import make_args, make_groups
from transformers import GPT2Config, GPT2LMHeadModel

import kvpref
from kvpref.data import load_preferences
from kvpref.errors import InputError

ROWS = [
    {"question": "2+2?", "chosen": "4", "rejected": "5", "weight": 1.0},
    {"question": "3+3?", "chosen": "6", "rejected": "five", "weight": 2.0},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer("chatml")


def make_trainer(folder: Path, tokenizer: Any, train_dataset: Any, **settings: Any) -> kvpref.PreferenceTrainer:
    config = GPT2Config(
        vocab_size=len(build_tokenizer("chatml")),
        n_positions=64,
        n_embd=8,
        n_layer=1,
        n_head=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    args = make_args(str(folder), loss="simpo", max_steps=1)
    return kvpref.PreferenceTrainer(
        GPT2LMHeadModel(config), args, train_dataset=train_dataset, processing_class=tokenizer, **settings
    )


def sources(folder: Path) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "list": ROWS,
        "iterator": iter(ROWS),
        "dataset": datasets.Dataset.from_list(ROWS),
        "path": folder / "rows.jsonl",
        "string": str(folder / "rows.jsonl"),
    }


@pytest.mark.parametrize("form", ["list", "iterator", "dataset", "path", "string"])
def test_rows_are_tokenized_by_the_processing_class(tmp_path: Path, tokenizer: Any, form: str, capsys) -> None:
    expected = load_preferences(ROWS, tokenizer)
    trainer = make_trainer(tmp_path, tokenizer, sources(tmp_path)[form], eval_dataset=sources(tmp_path)[form])
    said = capsys.readouterr().err
    for name, dataset in (("train_dataset", trainer.train_dataset), ("eval_dataset", trainer.eval_dataset)):
        assert dataset is not None
        assert dataset.fingerprint == expected.fingerprint
        assert f"{name}: `question` is taken as the prompt, since there is no `prompt` (2 rows)\n" in said


def test_training_and_evaluation_take_rows(tmp_path: Path, tokenizer: Any) -> None:
    trainer = make_trainer(tmp_path, tokenizer, ROWS, eval_dataset=ROWS[:1])
    own = trainer.evaluate()
    assert trainer.evaluate(ROWS[:1])["eval_loss"] == pytest.approx(own["eval_loss"], rel=1e-6)
    assert trainer.evaluate(ROWS[1:])["eval_loss"] != pytest.approx(own["eval_loss"], rel=1e-3)
    trainer.train()
    assert trainer.state.global_step == 1


def test_columns_of_the_loss_are_read(tmp_path: Path, tokenizer: Any) -> None:
    @kvpref.loss(columns=["weight"])
    def weighted(policy: Any, reference: Any, batch: kvpref.Batch) -> Any:
        return -(policy.sum() * batch.sequence_column("weight")).mean()

    trainer = make_trainer(tmp_path, tokenizer, ROWS, loss=weighted)
    assert trainer.train_dataset is not None
    assert [group.columns["weight"] for group in trainer.train_dataset] == [1.0, 2.0]


DATASET = datasets.Dataset.from_list(ROWS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (datasets.DatasetDict(train=DATASET), "found a DatasetDict of train; take one of its splits"),
        (DATASET.to_iterable_dataset(), "found an IterableDataset.*load it without streaming"),
        ([*ROWS, *make_groups(1)], "train_dataset holds Group, dict; expected groups .* or rows: a datasets.Dataset"),
        (["a", 3], "train_dataset holds int, str; expected groups"),
        (3, "expected a path, a dataset or a list of rows, found int"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ([{"question": "a"}], "row 1: missing field `responses`"),
    ],
    ids=["splits", "streaming", "mixed", "others", "number", "no file", "bad row"],
)
def test_what_is_no_data_is_told_in_one_line(tmp_path: Path, tokenizer: Any, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_trainer(tmp_path, tokenizer, data)
    assert "\n" not in str(caught.value)


def test_rows_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train_dataset holds rows, and there is no tokenizer.*processing_class"):
        make_trainer(tmp_path, None, ROWS)
    with pytest.raises(InputError, match="eval_dataset holds rows"):
        make_trainer(tmp_path, None, None).evaluate(ROWS)
