"""What templates mark as generated."""

from __future__ import annotations

from typing import Any

import pytest
from agent_templates import MARKED, PLAIN, build_agent_tokenizer, conversation, say

from kvpref.data import load_preferences
from kvpref.data.reading.response_spans import chat_template_of
from kvpref.data.reading.trajectories.marks import find_marked, marks_generation
from kvpref.errors import InputError


def test_marks_are_looked_for_where_they_can_be_read(slow_tokenizer: Any) -> None:
    assert marks_generation(chat_template_of(build_agent_tokenizer(MARKED)))
    assert not marks_generation(chat_template_of(build_agent_tokenizer(PLAIN)))
    slow_tokenizer.chat_template = MARKED
    assert not marks_generation(chat_template_of(slow_tokenizer))
    slow_tokenizer.chat_template = None


def test_marked_characters_are_those_of_the_assistant() -> None:
    template, messages = chat_template_of(build_agent_tokenizer(MARKED)), tuple(conversation("warm"))
    text = template.write(messages)
    found = [text[start:end] for start, end in find_marked(template, messages, text)]
    assert found[1:] == ["warm<|end|>", "yes<|end|>", "bye warm<|end|>"]
    assert found[0].startswith("<call>look")


def test_a_turn_without_marks_is_refused(write_jsonl: Any) -> None:
    blind = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.index0 != 3")
    messages = [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d")]
    path = write_jsonl({"trajectories": [{"messages": messages}]})
    with pytest.raises(InputError, match=r"messages\[3\]`: the chat template marks nothing of the turn as generated"):
        load_preferences(path, build_agent_tokenizer(blind))


def test_earlier_marks_are_not_scored_again_where_history_is_rewritten(write_jsonl: Any) -> None:
    # The last turn ends in another way than earlier ones, so each turn has a row of its own.
    ends = MARKED.replace("<|end|>{%- endgeneration", "{{ '!' if loop.last else '' }}<|end|>{%- endgeneration")
    messages = [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d")]
    tokenizer = build_agent_tokenizer(ends)
    [group] = load_preferences(write_jsonl({"trajectories": [{"messages": messages}]}), tokenizer)
    rows = [
        (tokenizer.decode(part.ids.tolist()).strip(), [tokenizer.decode(part.ids[a:b].tolist()) for a, b in part.turns])
        for part in group.sequences[0].parts
    ]
    first = "<|user|>a<|end|>\n<|assistant|>b"
    assert rows == [
        (f"{first}!<|end|>", ["b!<|end|>"]),
        (f"{first}<|end|>\n<|user|>c<|end|>\n<|assistant|>d!<|end|>", ["d!<|end|>"]),
    ]
