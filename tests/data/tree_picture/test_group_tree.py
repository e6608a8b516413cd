"""What a group and its sequences are called."""

from __future__ import annotations

from typing import Any

import pytest

from kvpref import Group, Sequence
from kvpref.data.tree_picture.group_tree import GroupTree, split_id

PROMPT = list(range(20))


def tree(*sequences: Sequence, **of_group: Any) -> GroupTree:
    return GroupTree.of(Group(sequences, **of_group))


def answer(token: int) -> Sequence:
    return Sequence.from_prompt_and_response(PROMPT, [token, 99])


@pytest.mark.parametrize(
    ("of_group", "expected"),
    [
        ({"scores": [0.123456, None]}, ["response 1, score 0.1235", "response 2, unrated"]),
        ({"ranks": [2, 1]}, ["response 1, rank 2", "response 2, rank 1"]),
        ({"labels": [True, False]}, ["response 1, chosen", "response 2, rejected"]),
        ({}, ["response 1", "response 2"]),
    ],
)
def test_responses_are_called_with_their_quality(of_group: dict[str, Any], expected: list[str]) -> None:
    found = tree(answer(50), answer(51), **of_group)
    assert [found.label((index,)) for index in (0, 1)] == expected


def test_attempts_are_responses_of_several_turns() -> None:
    turns = [False] * 20 + [True, False]
    early = Sequence([*PROMPT, 1, 2], [*turns[:-1], True])
    late = Sequence([*PROMPT, 3, 4, 5], [*turns, True], earlier=[early])
    found = tree(late, answer(50), scores=[1, 0], id="data/tau.jsonl:3 (airline-3)")
    assert found.title == "airline-3: 2 attempts"
    assert found.label((0,)) == "attempt 1, earlier turns"
    assert found.label((0, 1)) == "attempt 1, score 1, 3 turns; attempt 1, earlier turns"
    assert found.label((2,)) == "attempt 2, score 0, 1 turn"
    assert (found.numbers((0, 1, 2)), found.scored_name) == ("1, 2", "assistant turns")
    # 22 + 23 + 22 tokens, of which the 20 of the prompt run once.
    assert found.facts == "67 tokens, 27 unique: data saving 2.48x; 2 passes; 6 tokens scored"


def test_many_that_end_together_are_counted() -> None:
    found = tree(*[answer(50)] * 5, scores=[0, 1, 2, 3, 4])
    assert found.label((0, 1, 2, 3, 4)) == "response 1, score 0; response 2, score 1; 3 more"
    assert found.numbers((0, 1, 2, 3, 4)) == "1, 2, 3 more"


def test_ids_are_a_place_and_a_name() -> None:
    assert split_id("a (b)/x.jsonl:3 (task (1))") == ("a (b)/x.jsonl:3", "task (1)")
    assert split_id("a/x.json:row 3") == ("a/x.json:row 3", "")
    assert tree(answer(50), id="a/x.json:row 3").name == "x.json:row 3"
    assert tree(answer(50)).name == "group"
    assert len(tree(answer(50), id="a" * 100).name) == 40
