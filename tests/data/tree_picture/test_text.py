"""The tree as text."""

from __future__ import annotations

import re

from kvpref import Group, Sequence
from kvpref.data.tree_picture.group_tree import GroupTree
from kvpref.data.tree_picture.text import MAX_LINES, text_lines

PROMPT, TRUNK = list(range(100, 120)), list(range(200, 220))


def lines(*responses: list[int]) -> list[str]:
    sequences = [Sequence.from_prompt_and_response(PROMPT, response) for response in responses]
    found = text_lines(GroupTree.of(Group(sequences, scores=list(range(len(sequences))), id="a/rows.jsonl:7")))
    # In how many passes is the engine's choice.
    return [re.sub(r"\d+ passes", "some passes", line) for line in found]


def test_branches_stand_below_what_they_leave() -> None:
    assert lines([*TRUNK, 1, 2], [3], TRUNK, [*TRUNK, 4]) == [
        "rows.jsonl:7: 4 responses",
        "144 tokens, 44 unique: data saving 3.27x; some passes; 64 tokens scored",
        "0 to 20; 0 scored; in 4 of 4 sequences",
        "├─ 20 to 40; 20 scored; in 3 of 4 sequences; 1 ends on the way (response 3, score 2)",
        "│  ├─ 40 to 42; 2 scored: response 1, score 0",
        "│  └─ 40 to 41; 1 scored: response 4, score 3",
        "└─ 20 to 21; 1 scored: response 2, score 1",
    ]


def test_what_goes_on_without_a_branch_is_one_line() -> None:
    assert lines(TRUNK, [*TRUNK, *range(300, 320)])[2:] == [
        "0 to 60; 40 scored; in 2 of 2 sequences; 1 ends on the way (response 1, score 0): response 2, score 1",
    ]


def test_a_large_tree_is_cut_short() -> None:
    found = lines(*([token] for token in range(200)))
    assert len(found) == 2 + MAX_LINES + 1
    assert found[-1] == "... and 141 more branches"
