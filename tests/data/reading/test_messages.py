"""Messages in every form that data holds, and every way in which one can be bad."""

from __future__ import annotations

import pytest

from kvpref.data.reading.messages import RowError, parse_messages, parse_turns

CALL = {"function": {"name": "add", "arguments": {"left": 2}}}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_tool_calls_need_no_content(content):
    turn = {"role": "assistant", "tool_calls": [CALL], **content}
    assert parse_turns([turn], "chosen") == ({"role": "assistant", "tool_calls": [CALL], "content": ""},)


def test_reasoning_needs_no_content():
    assert parse_turns({"role": "assistant", "reasoning": "hm"}, "chosen") == (
        {"role": "assistant", "reasoning": "hm", "content": ""},
    )


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": None}, "a message without `content`"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "a message without `content`"),
        ({"role": "user", "content": None, "tool_calls": [CALL]}, "a message without `content`"),
        ({"role": "assistant", "content": 3}, r"`p\[0\].content` must be a string, found int"),
        (
            {"role": "user", "content": [{"type": "video"}]},
            r"`p\[0\].content\[0\]` is a part of type 'video'; only text",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r"`p\[0\].content\[0\]` is a part of type 'text'; only text"),
    ],
)
def test_bad_messages(message, reason):
    with pytest.raises(RowError, match=reason):
        parse_messages([message], "p")


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "2+2"}, {"type": "text", "text": "?", "image": None}, {"text": "!"}]
    assert parse_messages([{"role": "user", "content": parts}], "p") == ({"role": "user", "content": "2+2?!"},)


def test_empty_turns_are_refused():
    with pytest.raises(RowError, match="`chosen` is empty: no message has any content"):
        parse_turns([{"role": "assistant", "content": " ", "tool_calls": []}], "chosen")
