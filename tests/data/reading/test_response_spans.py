"""Which tokens of a conversation are scored: the cases that went wrong, and every family of chat templates."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from chat_families import FAMILIES, Message, build_tokenizer

from kvpref.data import load_preferences
from kvpref.data.reading.rendering import render_row
from kvpref.data.reading.rows import PreferenceRow
from kvpref.errors import InputError

GEN = "{% if add_generation_prompt %}A:{% endif %}"
QUESTIONS = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last %}[SYS]{% endif %}Q:{{ m.content }} "
    "{% else %}A:{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN_QUESTIONS = QUESTIONS.replace("{% if loop.last %}[SYS]{% endif %}", "")
THINKING = PLAIN_QUESTIONS + GEN.replace("A:", "A:<think>")
SHORTENING = (
    "{% set answers = messages | selectattr('role', 'equalto', 'assistant') | list %}"
    + PLAIN_QUESTIONS.replace("{{ m.content }}{{ eos", "{{ m.content if m == answers[-1] else '...' }}{{ eos")
    + GEN
)


def say(role: str, content: str | None, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


USER = say("user", "2+2?")
ASSISTANT = functools.partial(say, "assistant")


def scored_texts(path: str, tokenizer: Any) -> list[str]:
    return [
        tokenizer.decode([token for token, flag in zip(sequence.input_ids, sequence.scored, strict=True) if flag])
        for group in load_preferences(path, tokenizer)
        for sequence in group.sequences
    ]


def test_prompt_that_changes_once_an_answer_follows_is_refused(build_tokenizer, write_jsonl):
    path = write_jsonl({"prompt": [USER], "chosen": "4", "rejected": "5"})
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .* before the answer differently .*'\[SYS\]Q:.* became 'Q:"):
        load_preferences(path, build_tokenizer(chat_template=QUESTIONS + GEN))


@pytest.mark.parametrize("rejected", ["5", "<i>5</i>", "<think>x"])
def test_answer_without_what_the_generation_prompt_began_is_scored_whole(build_tokenizer, write_jsonl, rejected):
    path = write_jsonl({"prompt": [USER], "chosen": "<b>4</b>", "rejected": rejected})
    expected = ["<b>4</b></s>", f"{rejected}</s>"]
    assert scored_texts(path, build_tokenizer(chat_template=THINKING)) == expected


def test_answers_that_all_go_on_from_the_generation_prompt_are_scored_from_there(build_tokenizer, write_jsonl):
    path = write_jsonl({"prompt": [USER], "chosen": "<think>a</think>4", "rejected": "<think>b</think>5"})
    expected = ["a</think>4</s>", "b</think>5</s>"]
    assert scored_texts(path, build_tokenizer(chat_template=THINKING)) == expected


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"chosen": "4", "rejected": [say("user", ">5")]}, "`rejected`"),
        ({"responses": ["4", [say("tool", "5"), ASSISTANT("5")]]}, r"`responses\[1\]`"),
    ],
)
def test_response_that_does_not_begin_with_the_assistant_is_refused(build_tokenizer, write_jsonl, row, name):
    path = write_jsonl({"prompt": [USER], "chosen": "4", "rejected": "5"}, {"prompt": [USER], **row})
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: {name} begins with a turn of role '(user|tool)'.*assistant"):
        load_preferences(path, build_tokenizer(chat_template=PLAIN_QUESTIONS + GEN))


def test_template_that_rewrites_earlier_answers_of_the_prompt_is_refused(build_tokenizer, write_jsonl):
    path = write_jsonl({"prompt": [USER, ASSISTANT("four"), USER], "chosen": "4", "rejected": "5"})
    tokenizer = build_tokenizer(chat_template=SHORTENING)
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .* before the answer differently .*four.* became"):
        load_preferences(path, tokenizer)
    # One that shortens them before it asks, too, is taken: the model then sees the same.
    asking = SHORTENING.replace("m == answers[-1]", "loop.last")
    assert scored_texts(path, build_tokenizer(chat_template=asking)) == ["4</s>", "5</s>"]


def test_template_that_rewrites_earlier_answers_of_the_response_is_refused(build_tokenizer, write_jsonl):
    turns = [ASSISTANT("four"), say("user", "sure?"), ASSISTANT("yes")]
    path = write_jsonl({"prompt": [USER], "chosen": turns, "rejected": "5"})
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .* turn 1 of `chosen` differently .*four.* became"):
        load_preferences(path, build_tokenizer(chat_template=SHORTENING))


def test_assistant_turns_in_a_row_are_asked_for_one_by_one(write_jsonl):
    path = write_jsonl({"prompt": [USER], "responses": [[ASSISTANT("4"), ASSISTANT("or 100")]]})
    assert scored_texts(path, build_tokenizer("chatml")) == ["4<|im_end|>or 100<|im_end|>"]


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("qwen3", {}, "<think>\n\n</think>\n\n4<|im_end|>\n"),
        # With thinking switched off, the empty block is part of what asks for the answer.
        ("qwen3", {"enable_thinking": False}, "4<|im_end|>\n"),
        ("qwen25", {"tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}]}, "4<|im_end|>\n"),
    ],
)
def test_settings_reach_every_call_of_the_template(family, settings, expected):
    row = PreferenceRow((USER,), ((ASSISTANT("4"),),), template_settings=settings)
    rendered = render_row(row, build_tokenizer(family))
    assert rendered.spans is not None
    [(start, end)] = rendered.spans[0]
    assert rendered.texts[0][start:end] == expected
    assert ("# Tools" in rendered.texts[0]) == ("tools" in settings)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"left": 2, "right": 2}}}


def call_tools(more: str) -> list[Message]:
    return [say("assistant", None, tool_calls=[CALL]), say("tool", '{"sum": 4}'), ASSISTANT(f"It is 4{more}")]


def turns_of(scenario: str, reasoning_field: str) -> tuple[list[Message], list[list[Message]]]:
    """A prompt and four responses."""
    answers = [[ASSISTANT(text)] for text in ("four", "five <b>!", "4", "the answer is\n\n4")]
    talk = [USER, ASSISTANT("which base?"), say("user", "ten")]
    asked_back = [[ASSISTANT("ten?"), say("user", "yes"), *answer] for answer in answers[1:]]
    think = [[ASSISTANT(text, **{reasoning_field: f"{text} fits"})] for text in ("four", "five", "six", "7")]
    tags = [[ASSISTANT(f"<think>\nhm {number}\n</think>\n\n{number}")] for number in "4567"]
    return {
        "single": ([USER], answers),
        "system": ([say("system", "be brief"), USER], answers),
        "talk": (talk, answers),
        "asked back": ([USER], [answers[0], *asked_back]),
        "tools": (talk, [call_tools("!"), answers[1], call_tools("."), [*call_tools(""), *asked_back[0][1:]]]),
        "thinking": ([USER], think),
        "think tags": ([USER], tags),
    }[scenario]


LOST_CALLS = r"does not write `tool_calls\[0\]` of turn 1"
LOST_REASONING = "does not write `reasoning_content` of turn 1"
REFUSED = {
    ("gemma", "tools"): "refuses the messages .*alternate",
    ("no_system", "tools"): "refuses the messages .*role tool is not supported",
    ("no_system", "system"): "refuses the messages .*role system is not supported",
    ("deepseek_r1", "think tags"): "does not write `content` of turn 1",
    **{(family, "tools"): LOST_CALLS for family in ("phi", "chatml", "dated")},
    **{(family, "thinking"): LOST_REASONING for family in FAMILIES if family not in ("qwen3", "gpt_oss")},
}
ROWS = {
    "dpo": lambda responses: {"chosen": responses[0], "rejected": responses[1]},
    "sft": lambda responses: {"responses": responses[:1]},
    "grpo": lambda responses: {"responses": responses, "scores": [1, 0, 0.5, 0]},
}


@functools.cache
def tokenizer_of(family: str) -> Any:
    return build_tokenizer(family)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("scenario", ["single", "system", "talk", "asked back", "tools", "thinking", "think tags"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scored_tokens_are_those_that_a_reading_by_hand_marks(family, scenario, kind, write_jsonl):
    tokenizer = tokenizer_of(family)
    prompt, responses = turns_of(scenario, FAMILIES[family].reasoning_field)
    path = write_jsonl({"prompt": prompt, **ROWS[kind](responses)})
    if (family, scenario) in REFUSED:
        with pytest.raises(InputError, match=rf"rows\.jsonl:1: .*{REFUSED[family, scenario]}"):
            load_preferences(path, tokenizer)
        return
    [group] = load_preferences(path, tokenizer)
    for sequence, response in zip(group.sequences, responses, strict=False):
        ids, flags = [], []
        for turn, text, is_generated in FAMILIES[family].read(
            [*prompt, *response], tokenizer.decode(sequence.input_ids)
        ):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            flags += [is_generated and turn >= len(prompt) and [*prompt, *response][turn]["role"] == "assistant"] * len(
                tokens
            )
        assert tokenizer.decode(sequence.input_ids) == tokenizer.decode(ids)
        assert sequence.input_ids == tuple(ids)
        assert sequence.scored == tuple(flags)


def test_prompts_that_ask_for_thinking_and_answers_without_begin_alike(write_jsonl):
    tokenizer = build_tokenizer("qwen3")
    asks = "'<|im_start|>assistant\\n' -}}\n    {%- if enable_thinking"
    assert asks in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(asks, asks.replace("\\n'", "\\n<think>\\n'"))
    thinks = ASSISTANT("four", reasoning_content="2 and 2")
    asks_back = [ASSISTANT("ten?"), say("user", "yes"), ASSISTANT("five")]
    path = write_jsonl(
        {"prompt": [USER], "responses": [[thinks], [ASSISTANT("4")]]},
        {"prompt": [USER], "responses": [[thinks], asks_back]},
        name="thinking.jsonl",
    )
    thought = "2 and 2\n</think>\n\nfour<|im_end|>\n"
    empty = "\n</think>\n\n"
    assert scored_texts(path, tokenizer) == [
        thought,
        f"{empty}4<|im_end|>\n",
        # The template writes no thinking for a turn that a user answers, so both are scored from the role on.
        f"<think>\n{thought}",
        f"ten?<|im_end|>\n{empty}five<|im_end|>\n",
    ]
