"""What `kvpref demo --no-train` writes."""

from __future__ import annotations

import json
from pathlib import Path

import command_line_in_process as cli
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpref.data import load_preferences
from kvpref.demo import check
from kvpref.demo.evaluation import answer_greedily
from kvpref.demo.files import NUM_EVAL, NUM_TRAIN
from kvpref.demo.task import NUM_ANSWERS, Pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("files") / "demo"
    cli.run("demo", "--no-train", "--output", found)
    return found


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_groups_hold_the_pairs_prompts_with_one_right_answer(folder: Path) -> None:
    for name, count in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
        pairs, groups = rows(folder / f"{name}.jsonl"), rows(folder / f"{name}_groups.jsonl")
        assert [pair["prompt"] for pair in pairs] == [group["prompt"] for group in groups]
        assert len(pairs) == count
        for group in groups[:64]:
            assert isinstance(group["responses"], list)
            assert isinstance(group["scores"], list)
            assert len(set(group["responses"])) == NUM_ANSWERS
            assert [check(str(group["prompt"]), text) for text in group["responses"]] == [
                score == 1.0 for score in group["scores"]
            ]


def test_the_model_is_right_more_often_than_not_and_has_something_to_learn(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pairs = [Pair(**row) for row in rows(folder / "eval.jsonl")]  # type: ignore[arg-type]
    answers = answer_greedily(model.eval(), tokenizer, pairs)
    share = sum(check(pair.prompt, answer) for pair, answer in zip(pairs, answers, strict=True)) / len(pairs)
    # Other processors sum in another order, so the weights differ a little.
    assert 0.4 < share < 0.98
    assert len(load_preferences(str(folder / "eval_groups.jsonl"), tokenizer)) == NUM_EVAL
