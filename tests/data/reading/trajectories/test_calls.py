"""Rows of model calls: what they must hold, and how they are gathered."""

from __future__ import annotations

from typing import Any

import pytest
from agent_templates import say

from kvpref.data.reading.messages import RowError
from kvpref.data.reading.trajectories.calls import Call, gather, is_call, parse_call

HISTORY = [say("user", "q")]


def parse(place: int = 1, columns: tuple[str, ...] = (), **changes: Any) -> Call:
    history = [say("user", f"question {place}")]
    row = {"messages": history, "response": "a", "id": "t", "score": 1, **changes}
    assert is_call(row)
    return parse_call({name: value for name, value in row.items() if value != "left out"}, f"f:{place}", columns)


@pytest.mark.parametrize(
    "response", ["a", say("assistant", "a"), [say("assistant", "a"), say("tool", "x"), say("assistant", "b")]]
)
def test_a_response_is_a_text_a_message_or_several(response: Any) -> None:
    call = parse(response=response)
    assert [turn.message["content"] for turn in call.turns] == (["a", "b"] if isinstance(response, list) else ["a"])
    assert [len(turn.history) for turn in call.turns] == [1, 3][: len(call.turns)]
    assert {turn.location for turn in call.turns} == {"f:1"}


def test_attempts_are_gathered_in_the_order_of_their_first_call() -> None:
    task = gather([parse(n, attempt=a, score=s) for n, (a, s) in enumerate(((1, 3), (0, 2), (1, 3)))])
    assert [(attempt.score, len(attempt.turns)) for attempt in task.attempts] == [(3, 2), (2, 1)]


def test_scores_that_differ_are_by_turn_also_in_the_other_attempts() -> None:
    several = [say("assistant", "a"), say("tool", "x"), say("assistant", "b")]
    calls = [parse(1, attempt=0, score=1, response=several), parse(2, attempt=0, score=0), parse(3, attempt=1, score=4)]
    task = gather(calls)
    assert [attempt.turn_scores for attempt in task.attempts] == [(1, 1, 0), (4,)]
    assert [attempt.score for attempt in task.attempts] == [None, None]
    assert gather([calls[2]], by_turn=True).attempts[0].turn_scores == (4,)


def test_columns_of_calls_are_put_together() -> None:
    values = ({"logps": [1, 2], "gain": 5, "kind": "x"}, {"logps": [3], "gain": 6, "kind": "x"})
    calls = [parse(n, ("logps", "gain", "kind"), attempt=0, **own) for n, own in enumerate(values)]
    assert gather(calls).attempts[0].columns == {"logps": [1, 2, 3], "gain": [5, 6], "kind": "x"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response": "left out"}, "missing field `response` beside `messages`; expected {messages, response, id"),
        ({"id": "left out"}, "missing field `id` beside `messages`"),
        ({"response": 3}, "`response` must be a string, a message or a list of messages, found int"),
        ({"response": say("user", "a")}, "`response` has no turn of role 'assistant'.*found roles: user"),
        ({"messages": "q"}, "`messages` must be a list of messages, found string"),
        ({"attempt": 1.5}, "`attempt` must be a string or an integer, found float"),
        ({"prompt": "a"}, "found both `messages` and `prompt`"),
    ],
)
def test_malformed_calls_say_what_was_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse(**changes)


def test_calls_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(RowError, match="the call at f:2 has no `attempt`, and others have"):
        gather([parse(1, attempt=0), parse(2)])
    with pytest.raises(RowError, match="the call at f:2 has no `score`, and others have"):
        gather([parse(1, attempt=0), parse(2, attempt=0, score="left out")])


@pytest.mark.parametrize("row", [{"prompt": "a", "chosen": "b", "rejected": "c", "messages": []}, {"messages": None}])
def test_other_rows_are_no_calls(row: dict[str, Any]) -> None:
    assert not is_call(row)


def test_a_call_that_stands_twice_in_an_attempt_would_count_twice() -> None:
    with pytest.raises(RowError, match=r"the call is that at f:1 again, of attempt 0 of 't'") as caught:
        gather([parse(1, attempt=0, messages=HISTORY), parse(2, attempt=0, messages=HISTORY)])
    assert caught.value.location == "f:2"
    # Two attempts, or two answers to one history, may well be alike.
    for attempts in ((0, 1), (None, None)):
        calls = [parse(place, attempt=attempt, messages=HISTORY) for place, attempt in enumerate(attempts)]
        assert len(gather(calls).attempts) == 2


def test_calls_of_a_task_have_a_column_all_or_none() -> None:
    with pytest.raises(RowError, match="the call at f:2 has no `token_weights`, and others have"):
        gather([parse(1, ("token_weights",), token_weights=2), parse(2)])


def test_columns_are_lists_in_all_calls_of_an_attempt_or_in_none() -> None:
    calls = [parse(1, ("gain",), attempt=0, gain=[1, 2]), parse(2, ("gain",), attempt=0, gain=3)]
    with pytest.raises(RowError, match="`gain` is no list here, and one in other calls of attempt 0") as caught:
        gather(calls)
    assert caught.value.location == "f:2"
