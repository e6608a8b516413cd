"""The demonstration's task: right answers by a second program's reckoning, wrong ones, and one data set per seed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvpref.demo.task import Pair, check, make_pairs, write_pairs

LINE = re.compile(r"^(\d(?: \d)*) ->(?: largest (\d))?$")


def parse(prompt: str) -> list[tuple[list[int], int | None]]:
    """Digits and answer of every line, by the text alone; the question has no answer."""
    matches = [LINE.match(line) for line in prompt.split("\n")]
    assert all(matches), prompt
    return [([int(digit) for digit in m[1].split()], None if m[2] is None else int(m[2])) for m in matches if m]


@pytest.fixture(scope="module")
def pairs() -> tuple[list[Pair], list[Pair]]:
    return make_pairs(seed=3, num_train=200, num_eval=50)


def test_examples_and_chosen_answers_are_right(pairs: tuple[list[Pair], list[Pair]]) -> None:
    for pair in pairs[0] + pairs[1]:
        *examples, (question, none) = parse(pair.prompt)
        assert none is None
        assert len(examples) >= 12
        assert all(answer == sorted(digits)[-1] for digits, answer in examples)
        assert pair.chosen == f" largest {sorted(question)[-1]}"
        assert check(pair.prompt, pair.chosen)


def test_rejected_answers_are_wrong_digits(pairs: tuple[list[Pair], list[Pair]]) -> None:
    for pair in pairs[0] + pairs[1]:
        question, _ = parse(pair.prompt)[-1]
        answer = re.fullmatch(r" largest (\d)", pair.rejected)
        assert answer is not None
        assert int(answer[1]) != sorted(question)[-1]
        assert not check(pair.prompt, pair.rejected)


@pytest.mark.parametrize(
    "response", ["", "7", "largest", "largest 6", "largest 7 7", "largest 7 \n 1", "</s> largest 7"]
)
def test_check_refuses_anything_but_the_answer(response: str) -> None:
    prompt = "9 1 2 -> largest 9\n3 7 0 ->"
    assert check(prompt, " largest 7")
    assert not check(prompt, response)


def test_no_held_out_question_is_asked_in_training(pairs: tuple[list[Pair], list[Pair]]) -> None:
    train, held_out = ({pair.prompt.rpartition("\n")[2] for pair in rows} for rows in pairs)
    assert len(held_out) == 50
    assert not train & held_out


def test_the_seed_decides(pairs: tuple[list[Pair], list[Pair]], tmp_path: Path) -> None:
    assert make_pairs(seed=3, num_train=200, num_eval=50) == pairs
    assert make_pairs(seed=4, num_train=200, num_eval=50) != pairs
    write_pairs(pairs[0], tmp_path / "a.jsonl")
    write_pairs(make_pairs(seed=3, num_train=200, num_eval=50)[0], tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
