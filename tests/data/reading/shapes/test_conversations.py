"""Conversations alone are demonstrations; what else has messages is not."""

from __future__ import annotations

from typing import Any

import pytest

from kvpref.data.reading.messages import RowError
from kvpref.data.reading.shapes.conversations import as_trajectory, is_conversation
from kvpref.data.reading.trajectories.calls import is_call
from kvpref.data.reading.trajectories.rows import parse_trajectories

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [USER, GOOD, USER, GOOD]},
        {"messages": [USER, GOOD, USER, GOOD], "prompt": " hi", "label": None},
        {"conversation": [{"human": "hi", "assistant": "hello"}, {"human": "hi", "assistant": "hello"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}] * 2},
    ],
)
def test_every_turn_of_the_assistant_is_scored(columns: dict[str, Any]) -> None:
    row = {"id": 3, **columns}
    assert is_conversation(row)
    assert not is_call(row)
    task = parse_trajectories(as_trajectory(row))
    (attempt,) = task.attempts
    assert (task.id, attempt.score) == ("3", None)
    assert [turn.message for turn in attempt.turns] == [GOOD, GOOD]
    assert attempt.turns[1].history == (USER, GOOD, USER)


def test_weights_of_tokens_are_the_conversations() -> None:
    row = as_trajectory({"messages": [USER, GOOD], "token_weights": [2], "tools": []})
    assert row["trajectories"][0]["token_weights"] == [2]
    assert parse_trajectories(row, ("token_weights",)).attempts[0].columns == {"token_weights": [2]}


@pytest.mark.parametrize(
    "columns", [{"response": "a"}, {"chosen": [GOOD]}, {"label": True}, {"score": 1}, {"rejected_response": "a"}]
)
def test_what_judges_or_answers_the_messages_makes_another_row(columns: dict[str, Any]) -> None:
    assert not is_conversation({"messages": [USER, GOOD], **columns})


def test_a_call_whose_response_is_missing_is_no_demonstration() -> None:
    """All that the history holds would be learned."""
    for columns in ({"response": None}, {"attempt": 0}):
        assert is_call({"messages": [USER, GOOD], "id": 1, **columns})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER], "solution": "x"}, "`messages` has no turn of role 'assistant', so there is nothing to"),
        ({"messages": "hi"}, "`messages` must be a list of messages, found string"),
        ({"messages": [USER, GOOD], "prompt": "other"}, "found `prompt` and `messages`, and the messages do not hold"),
        ({"messages": [USER, GOOD], "conversations": [USER]}, "found `messages` and `conversations`, and either may"),
    ],
)
def test_bad_conversations(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        as_trajectory(row)
    assert reason in str(caught.value)
