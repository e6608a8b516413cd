"""The forms in which templates are given tool calls."""

from __future__ import annotations

from typing import Any

import pytest
from agent_templates import say

from kvpref.data.reading.trajectories.attempts import Attempt, Turn
from kvpref.data.reading.trajectories.forms import forms_of, prints_objects


def attempt(arguments: Any, content: str = "") -> Attempt:
    asks = say("assistant", content, tool_calls=[{"function": {"name": "f", "arguments": arguments}}])
    return Attempt(
        (Turn((say("user", "q"),), asks, "first"), Turn((say("user", "q"), asks), say("assistant", "a"), "x")), "t"
    )


def forms(given: Attempt) -> list[tuple[Any, Any]]:
    found = []
    for form in forms_of(given):
        first, second = form.turns
        assert second.history[1] is first.message, "a message is changed once"
        found.append((first.message["tool_calls"][0]["function"]["arguments"], first.message["content"]))
    return found


@pytest.mark.parametrize("arguments", [{"a": "\u00e9"}, '{"a": "\u00e9"}'])
def test_objects_come_first_then_text_each_also_without_content(arguments: Any) -> None:
    as_object, as_text = {"a": "\u00e9"}, '{"a": "\u00e9"}'
    assert forms(attempt(arguments)) == [(as_object, ""), (as_object, None), (as_text, ""), (as_text, None)]
    assert forms(attempt(arguments, "said")) == [(as_object, "said"), (as_text, "said")]


@pytest.mark.parametrize("arguments", ["{not json", "[1]"])
def test_text_that_is_no_object_stays(arguments: str) -> None:
    assert {found for found, _ in forms(attempt(arguments))} == {arguments}


def test_attempts_without_calls_have_one_form() -> None:
    given = Attempt((Turn((say("user", "q"),), say("assistant", "a"), "x"),), "t")
    assert list(forms_of(given)) == [given]


def test_arguments_in_pythons_words_are_seen_where_the_data_has_text() -> None:
    written = attempt({"a": 1}).turns[0].message
    assert prints_objects(attempt('{"a": 1}'), written, "call {'a': 1}")
    assert not prints_objects(attempt('{"a": 1}'), written, 'call {"a": 1}')
    assert not prints_objects(attempt({"a": 1}), written, "call {'a': 1}")
