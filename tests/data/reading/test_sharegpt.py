"""Messages of `from` and `value`."""

from __future__ import annotations

from typing import Any

import pytest

from kvpref.data.reading.messages import RowError, parse_messages
from kvpref.data.reading.sharegpt import ROLES, as_messages


@pytest.mark.parametrize(("sender", "role"), [(name, role) for name, role in ROLES.items() if name != "function_call"])
def test_senders_have_roles(sender: str, role: str) -> None:
    assert parse_messages([{"from": sender, "value": "hi", "weight": None}], "prompt") == (
        {"role": role, "content": "hi"},
    )


@pytest.mark.parametrize("value", ['{"name": "f", "arguments": {"x": 1}}', {"name": "f", "arguments": {"x": 1}}])
def test_calls_of_tools_are_the_assistants(value: Any) -> None:
    (message,) = parse_messages([{"from": "function_call", "value": value}], "prompt")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert message == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_content_may_be_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_messages([{"from": "human", "value": parts}], "prompt") == ({"role": "user", "content": "ab"},)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"from": "narrator", "value": "a"}, "`prompt[0].from` is 'narrator'; expected one of human, user, gpt"),
        ({"from": "human", "content": "a"}, "`prompt[0]` has both `from` and `content`"),
        ({"from": "human"}, "`prompt[0]` is a message without `content`"),
        ({"from": "function_call", "value": "f(1)"}, "`prompt[0].value` of a function_call is not valid JSON"),
        ({"from": "function_call", "value": "[1]"}, "`prompt[0].value` of a function_call must be {name, arguments}"),
    ],
)
def test_bad_messages(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_messages([message], "prompt")
    assert reason in str(caught.value)


def test_rounds_are_messages() -> None:
    rounds = [{"human": "a", "assistant": "b"}, {"tool": "c", "assistant": "d"}]
    assert [message["from"] for message in as_messages(rounds)] == ["human", "assistant", "tool", "assistant"]
    for other in ("text", [{"role": "user", "content": "a"}], [{"human": "a"}]):
        assert as_messages(other) == other
