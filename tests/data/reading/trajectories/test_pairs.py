"""Of several attempts the best and the worst, for losses that compare two."""

from __future__ import annotations

from typing import Any

import pytest
from agent_templates import PLAIN, build_agent_tokenizer, say, scored_texts

from kvpref.data import DataOptions, load_preferences
from kvpref.errors import InputError
from kvpref.losses import LOSSES, make_loss

PAIRS = DataOptions(trajectory_pairs=True)


def row(name: str, scores: list[Any], **more: Any) -> dict[str, Any]:
    items = [
        {"messages": [say("user", "q"), say("assistant", f"{name}{n}")], "score": score}
        for n, score in enumerate(scores)
    ]
    return {"id": name, "trajectories": items, **more}


def test_best_and_worst_are_kept_and_ties_left_out(write_jsonl: Any) -> None:
    tokenizer = build_agent_tokenizer(PLAIN)
    rows = [row("a", [0.5, 1, 0, 1, None]), row("b", [1, 1]), row("c", [0, 2]), row("d", [None, None])]
    dataset = load_preferences(write_jsonl(*rows), tokenizer, PAIRS)
    texts = [[scored_texts(sequence, tokenizer) for sequence in group.sequences] for group in dataset]
    assert texts == [[["a1<|end|>"], ["a2<|end|>"]], [["c0<|end|>"], ["c1<|end|>"]]]
    assert [group.scores for group in dataset] == [(1, 0), (0, 2)]
    assert dataset.report is not None
    assert (dataset.report.num_pairs, dataset.report.num_equal) == (2, 2)
    assert any("of 2 groups of trajectories the best and the worst" in line for line in dataset.report.notices)


def test_columns_and_scores_by_turn_go_with_the_pair(write_jsonl: Any) -> None:
    given = row("a", [None] * 3, kind=["x", "y", "z"])
    for item, score in zip(given["trajectories"], (1, 3, 2), strict=True):
        item["turn_scores"] = [score]
    options = DataOptions(trajectory_pairs=True, columns=("kind",))
    [group] = load_preferences(write_jsonl(given), build_agent_tokenizer(PLAIN), options)
    assert group.columns == {"kind": ["x", "y"], "turn_scores": [[1], [3]]}


def test_data_without_preferences_says_so(write_jsonl: Any) -> None:
    with pytest.raises(InputError, match="no group of trajectories has two different scores"):
        load_preferences(write_jsonl(row("b", [1, 1])), build_agent_tokenizer(PLAIN), PAIRS)


def test_other_rows_stay_as_they_are(write_jsonl: Any) -> None:
    given = {"prompt": [say("user", "q")], "responses": ["a", "b", "c"], "scores": [1, 2, 3]}
    [group] = load_preferences(write_jsonl(given), build_agent_tokenizer(PLAIN), PAIRS)
    assert len(group) == 3


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mixture"])  # that one is made of others
def test_losses_that_refuse_three_responses_ask_for_pairs(name: str, write_jsonl: Any) -> None:
    loss = make_loss(name)
    [group] = load_preferences(write_jsonl(row("a", [0.5, 1, 0])), build_agent_tokenizer(PLAIN))
    try:
        list(loss.prepare([group]))
        needs_two = False
    except InputError as error:
        needs_two = "exactly 2 responses" in str(error)
    assert loss.reads_pairs == needs_two
