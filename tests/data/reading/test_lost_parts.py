"""What a template writes in its own way passes; what it leaves out is named."""

from __future__ import annotations

import pytest

from kvpref.data.reading.lost_parts import check_nothing_lost
from kvpref.data.reading.messages import RowError

CALL = {"function": {"name": "add", "arguments": {"left": 2}}}


def check(turn: dict, written: str, before: str = "Q: 4? A:") -> None:
    check_nothing_lost([{"role": "assistant", **turn}], before + written, [(len(before), len(before + written))], "it")


@pytest.mark.parametrize(
    ("turn", "written"),
    [
        ({"content": " four\n\n"}, "four</s>"),
        ({"content": "<think>a\n</think>b"}, "<think>\na\n</think>\n\nb"),
        ({"content": 'say "hi"\n'}, r'{"text": "say \"hi\"\n"}'),
        ({"content": "", "tool_calls": [CALL]}, "<function=add><parameter=left>2</parameter></function>"),
        ({"content": "", "tool_calls": [CALL["function"]]}, '{"name": "add", "arguments": {"left": 2}}'),
        ({"content": "x", "thinking": "hm"}, "hm</think>x"),
        ({"content": "x", "thinking": True}, "x"),
    ],
)
def test_written_parts_pass(turn, written):
    check(turn, written)


@pytest.mark.parametrize(
    ("turn", "written", "part"),
    [
        ({"content": "<think>a</think>4"}, "4</s>", r"`content` of turn 1 of it \('<think>a</think>4'\)"),
        ({"content": "4"}, "</s>", "`content`"),  # a 4 in the prompt is not the answer's
        ({"content": "x", "thinking": "hm"}, "x", "`thinking`"),
        ({"content": "x", "reasoning": "hm"}, "x", "`reasoning`"),
        ({"content": "x", "reasoning_content": "hm"}, "x", "`reasoning_content`"),
        ({"content": "x", "tool_calls": [CALL]}, "x", r"`tool_calls\[0\]`"),
        ({"content": "x", "tool_calls": [CALL]}, "x add()", r"argument 'left' of `tool_calls\[0\]`"),
    ],
)
def test_lost_parts_are_named(turn, written, part):
    with pytest.raises(RowError, match=f"does not write {part}.*remove it from the data, or use a template"):
        check(turn, written)


def test_content_that_the_generation_prompt_begins_passes():
    check({"content": "<think>\na</think>4"}, "a</think>4", before="A: <think>\n")


def test_tool_results_are_looked_for_behind_the_first_turn():
    turns = [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "12"}]
    check_nothing_lost(turns, "Q: x [12]", [(3, 4)], "it")
    with pytest.raises(RowError, match=r"does not write `content` of turn 2 of it \('12'\)"):
        check_nothing_lost(turns, "Q: 12 x", [(6, 7)], "it")
