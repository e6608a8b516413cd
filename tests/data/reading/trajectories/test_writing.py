"""Every assistant turn is scored once, with the history that the model saw when it made it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from agent_templates import (
    MARKED,
    PLAIN,
    RAISES,
    THINKS,
    build_agent_tokenizer,
    call,
    calls_of,
    conversation,
    say,
    scored_texts,
    written_turn,
)

from kvpref.data import load_preferences
from kvpref.errors import InputError

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def assistant_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["role"] == "assistant"]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["compared", "marked"])
def test_every_assistant_turn_is_scored_and_nothing_else(template: str, write_jsonl: Any) -> None:
    tokenizer = build_agent_tokenizer(template)
    trajectories = [{"messages": conversation(text), "score": score} for text, score in (("warm", 1), ("cold", 0))]
    [group] = load_preferences(write_jsonl({"id": "t", "trajectories": trajectories, "tools": TOOLS}), tokenizer)
    assert group.scores == (1, 0)
    for sequence, trajectory in zip(group.sequences, trajectories, strict=True):
        assert not sequence.earlier
        assert scored_texts(sequence, tokenizer) == list(map(written_turn, assistant_turns(trajectory["messages"])))
        # What stands behind the last turn is seen by no scored token.
        assert "STOP" not in tokenizer.decode(sequence.ids.tolist())


def test_marks_are_what_transformers_says(write_jsonl: Any) -> None:
    tokenizer, messages = build_agent_tokenizer(MARKED), conversation("warm")[:-1]
    [group] = load_preferences(write_jsonl({"trajectories": [{"messages": messages}]}), tokenizer)
    marked = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert list(group.sequences[0].input_ids) == marked["input_ids"]
    assert [int(flag) for flag in group.sequences[0].scored] == marked["assistant_masks"]


def test_dropped_thinking_makes_parts_with_the_history_of_each_turn(write_jsonl: Any) -> None:
    tokenizer, messages = build_agent_tokenizer(THINKS), conversation("warm", thinks=True)
    dataset = load_preferences(write_jsonl({"id": "t", "trajectories": [{"messages": messages}]}), tokenizer)
    [sequence] = dataset[0].sequences
    # The call of tools and the answer to them stand behind one question; further questions drop what was thought.
    assert [len(part.turns) for part in sequence.parts] == [2, 1, 1]
    expected = [written_turn(turn, thinks=True) for turn in assistant_turns(messages)]
    assert scored_texts(sequence, tokenizer) == expected
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [(part, first) for part in sequence.parts for first, _ in part.turns]
    for place, (part, first) in zip(places, turns, strict=True):
        seen = tokenizer.apply_chat_template(messages[:place], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(part.ids[:first].tolist()) == seen
    report = dataset.report
    assert report is not None
    assert (report.num_rewritten, report.num_earlier_parts, report.num_turns) == (1, 2, 4)
    # By hand: the rows part at the first "<think>" that is dropped; the "<" of the first one begins a "<call>", too.
    texts = [tokenizer.decode(part.ids.tolist()) for part in sequence.parts]
    parted = [texts[0].index("<think>") + 1, texts[1].rindex("<think>")]
    tails = [len(tokenizer(text[place:])["input_ids"]) for text, place in zip(texts, parted, strict=False)]
    assert report.rewritten_tokens == sum(tails)
    assert any("1 of 1 trajectories are written in several token rows (2 more)" in line for line in report.notices)


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKS], ids=["plain", "marked", "thinks"])
def test_calls_of_attempts_are_the_same_group_as_trajectories(template: str, write_jsonl: Any) -> None:
    tokenizer = build_agent_tokenizer(template)
    talks = [conversation(text, thinks=template == THINKS) for text in ("warm", "cold")]
    whole = [{"messages": talk, "score": score} for talk, score in zip(talks, (1, 0.5), strict=True)]
    rows = [calls_of(talk, id="t", attempt=n, score=1 - n / 2) for n, talk in enumerate(talks)]
    mixed = [row for pair in zip(*rows, strict=True) for row in pair]
    [by_call] = load_preferences(write_jsonl(*mixed, name="calls.jsonl"), tokenizer)
    [by_trajectory] = load_preferences(write_jsonl({"id": "t", "trajectories": whole}), tokenizer)
    assert by_call.sequences == by_trajectory.sequences
    assert by_call.scores == by_trajectory.scores == (1, 0.5)


def test_template_that_raises_names_row_trajectory_and_message(write_jsonl: Any) -> None:
    wrong = conversation("cold")
    del wrong[4]["tool_call_id"]
    rows = [{"id": n, "trajectories": [{"messages": conversation("warm")}, {"messages": m}]} for n, m in ((1, wrong),)]
    good = {"id": 0, "trajectories": [{"messages": conversation("warm")}]}
    expected = (
        r"rows\.jsonl:2: `trajectories\[1\]\.messages\[5\]`: the chat template refuses the messages \(a tool result "
        r"needs its tool_call_id\); the first message that it refuses is message 5 of 6, of role 'tool'"
    )
    with pytest.raises(InputError, match=expected):
        load_preferences(write_jsonl(good, *rows), build_agent_tokenizer(RAISES))


def test_template_that_raises_names_the_row_of_the_call(write_jsonl: Any) -> None:
    wrong = conversation("cold")
    del wrong[4]["tool_call_id"]
    rows = calls_of(conversation("warm"), id="a", attempt=0) + calls_of(wrong, id="b", attempt=0)
    with pytest.raises(
        InputError, match=r"rows\.jsonl:6: `response\[0\]`: the chat template refuses .* message 5 of 6"
    ):
        load_preferences(write_jsonl(*rows), build_agent_tokenizer(RAISES))


def test_what_a_template_leaves_out_is_refused(write_jsonl: Any) -> None:
    deaf = PLAIN.replace("{{ m.content or '' }}", "{{ m.content if m.role != 'tool' else '' }}")
    path = write_jsonl({"id": 1, "trajectories": [{"messages": conversation("warm")}]})
    with pytest.raises(InputError, match=r"does not write turn 4 of the prompt, of role 'tool' \('sun'\)"):
        load_preferences(path, build_agent_tokenizer(deaf))
    path = write_jsonl({"id": 1, "trajectories": [{"messages": conversation("warm", thinks=True)}]})
    with pytest.raises(InputError, match=r"messages\[2\]`: .* does not write `reasoning_content`"):
        load_preferences(path, build_agent_tokenizer(PLAIN))


TEXT_ONLY = PLAIN.replace("{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}")
PRINTS = PLAIN.replace("{{ call.function.arguments | tojson }}", "{{ call.function.arguments }}")


@pytest.mark.parametrize(
    ("template", "as_text"),
    # A template that prints objects prints what it is given: only text can be told from it.
    [(PLAIN, False), (PLAIN, True), (TEXT_ONLY, False), (TEXT_ONLY, True), (PRINTS, True)],
)
def test_arguments_are_written_as_the_template_takes_them(template: str, as_text: bool, write_jsonl: Any) -> None:
    arguments = {"city": "Rome", "days": [1, 2]}
    asks = call("look", **arguments)
    if as_text:
        asks["function"]["arguments"] = json.dumps(arguments)
    messages = [say("user", "weather?"), say("assistant", None, tool_calls=[asks]), say("tool", "sun")]
    messages.append(say("assistant", "fine"))
    tokenizer = build_agent_tokenizer(template)
    [group] = load_preferences(write_jsonl({"trajectories": [{"messages": messages}]}), tokenizer)
    assert scored_texts(group.sequences[0], tokenizer) == [
        '<call>look {"city": "Rome", "days": [1, 2]}</call><|end|>',
        "fine<|end|>",
    ]
