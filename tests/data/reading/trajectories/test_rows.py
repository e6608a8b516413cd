"""Rows of trajectories: what they must hold, and what is said where they do not."""

from __future__ import annotations

from typing import Any

import pytest
from agent_templates import say

from kvpref.data.reading.messages import RowError
from kvpref.data.reading.trajectories.rows import has_trajectories, parse_trajectories

TALK = [say("user", "q"), say("assistant", "a"), say("tool", None), say("assistant", "b")]


def row(*items: Any, **more: Any) -> dict[str, Any]:
    return {"id": "t", "trajectories": list(items), **more}


def test_each_assistant_turn_has_its_history() -> None:
    task = parse_trajectories(row({"messages": TALK, "score": 2, "turn_scores": [0.5, 1]}, system="be brief"))
    [attempt] = task.attempts
    assert [len(turn.history) for turn in attempt.turns] == [2, 4]
    assert [turn.history[0]["content"] for turn in attempt.turns] == ["be brief"] * 2
    # Names count the messages of the row, which the system message is none of.
    assert [turn.name for turn in attempt.turns] == [f"`trajectories[0].messages[{index}]`" for index in (1, 3)]
    assert (task.id, attempt.score, attempt.turn_scores) == ("t", 2.0, (0.5, 1.0))
    # A tool that returned nothing.
    assert attempt.turns[1].history[3]["content"] == ""


def test_settings_of_a_trajectory_win() -> None:
    tools = [[{"function": {"name": name}}] for name in "ab"]
    task = parse_trajectories(row({"messages": TALK}, {"messages": TALK, "tools": tools[1]}, tools=tools[0]))
    assert [attempt.turns[0].settings for attempt in task.attempts] == [{"tools": own} for own in tools]


def test_columns_of_the_row_and_of_trajectories() -> None:
    items = [{"messages": TALK, "own": number} for number in range(2)]
    task = parse_trajectories(row(*items, kind="x", listed=[5, 6], extra=1), ("kind", "listed", "own"))
    assert task.columns == {"kind": "x"}
    assert [attempt.columns for attempt in task.attempts] == [{"listed": 5, "own": 0}, {"listed": 6, "own": 1}]
    assert task.unread == ("extra",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (row(), "`trajectories` is empty"),
        ({"trajectories": "a"}, "`trajectories` must be a list, found string; expected {id, trajectories"),
        (row("a"), r"`trajectories\[0\]` must be an object with `messages`, found string"),
        (row({"score": 1}), r"`trajectories\[0\]` has no `messages`; expected .*, found score"),
        (row({"messages": "hi"}), r"`trajectories\[0\]\.messages` must be a list of messages, found string"),
        (row({"messages": TALK[:1]}), r"`trajectories\[0\]\.messages` has no turn of role 'assistant'.*roles: user"),
        (row({"messages": TALK[1:]}), "begins with an assistant turn, which answers nothing"),
        (row({"messages": [{"content": "a"}]}), r"`trajectories\[0\]\.messages\[0\]` is a message without `role`"),
        (row({"messages": TALK, "score": "1"}), r"`trajectories\[0\]\.score` must be a number or null, found string"),
        (
            row({"messages": TALK, "turn_scores": [1]}),
            r"`trajectories\[0\]\.turn_scores` has 1 entries for 2 ",
        ),
        (row({"messages": TALK, "turn_scores": [1, None]}), r"turn_scores\[1\]` must be a number, found null"),
        (
            row({"messages": TALK, "turn_scores": [1, 2]}, {"messages": TALK}),
            r"`trajectories\[1\]` has no `turn_scores`",
        ),
        (
            row({"messages": TALK}, scores=[1]),
            "found `scores` beside `trajectories`; give each trajectory its own `score`",
        ),
        (row({"messages": TALK}, turn_scores=[[1, 2]]), "found `turn_scores` beside `trajectories`"),
        (row({"messages": TALK}, prompt="a"), "found both `trajectories` and `prompt`"),
        (row({"messages": TALK}, images=["a.png"]), "images in trajectories are not supported"),
        (row({"messages": TALK}, id=1.5), "`id` must be a string or an integer, found float"),
    ],
)
def test_malformed_rows_say_what_was_expected(given: dict[str, Any], message: str) -> None:
    assert has_trajectories(given)
    with pytest.raises(RowError, match=message):
        parse_trajectories(given)


@pytest.mark.parametrize(
    ("items", "more", "message"),
    [
        ([{"messages": TALK}], {}, "missing column `gain`, which the loss reads"),
        ([{"messages": TALK, "gain": 1}, {"messages": TALK}], {}, r"`trajectories\[1\]` has no `gain`"),
        ([{"messages": TALK, "gain": 1}], {"gain": 2}, "column `gain` both in the row and in its trajectories"),
    ],
)
def test_columns_that_lack_say_so(items: list[Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_trajectories(row(*items, **more), ("gain",))


def test_weights_of_the_row_are_one_per_trajectory() -> None:
    with pytest.raises(RowError, match="`token_weights` must be a list with one entry for each of the 1 trajectories"):
        parse_trajectories(row({"messages": TALK}, token_weights=[1, 2]), ("token_weights",))


def test_scores_by_turn_that_a_loss_reads_must_be_there() -> None:
    with pytest.raises(RowError, match="missing column `turn_scores`"):
        parse_trajectories(row({"messages": TALK, "score": 1}), ("turn_scores",))


def test_a_column_of_a_trajectory_must_be_finite() -> None:
    items = [{"messages": TALK, "advantage": value} for value in (0.5, float("nan"))]
    with pytest.raises(RowError, match=r"`trajectories\[1\].advantage` is nan; expected a finite number"):
        parse_trajectories(row(*items), ["advantage"])
    with pytest.raises(RowError, match=r"`advantage\[1\]` is inf"):
        parse_trajectories(row({"messages": TALK}, {"messages": TALK}, advantage=[1, float("inf")]), ["advantage"])
