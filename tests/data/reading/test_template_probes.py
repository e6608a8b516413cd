"""What a template leaves out is found, also where the same text occurs elsewhere; how often it is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_families import build_tokenizer

from kvpref.data import load_preferences
from kvpref.errors import InputError

ONLY_TALK = (
    "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_RESULTS = ONLY_TALK.replace("('user', 'assistant')", "('user', 'assistant', 'tool')").replace(
    "{{ m.content }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
)
ONLY_ANSWERS = ONLY_TALK.replace("{{ m.content }}", "{{ m.content if m.role == 'assistant' or loop.first }}")
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments }}]{% endfor %}"
WITH_CALLS = ONLY_TALK.replace("('user', 'assistant')", "('user', 'assistant', 'tool')").replace(
    "{{ eos", f"{CALLS}{{{{ eos"
)


def say(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(*names: str, arguments: Any = None) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments or {"q": 2}}} for name in names]
    return say("assistant", None, tool_calls=calls)


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {}}}


ASK = say("user", "Answer q0, and add 4.")
FOUR = say("assistant", "It is 4")
PAIR = {"prompt": [ASK], "chosen": [FOUR], "rejected": "add 5 to 4, Answer"}
RESULT = say("tool", "4")


def load(template: str, *rows: dict[str, Any]) -> Any:
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = template
    return load_preferences(list(rows), tokenizer)


@pytest.mark.parametrize(
    ("template", "row", "lost"),
    [
        (ONLY_TALK, PAIR | {"system": "Answer"}, r"turn 1 of the prompt, of role 'system' \('Answer'\)"),
        (ONLY_TALK, PAIR | {"prompt": [ASK, FOUR, RESULT]}, r"turn 3 of the prompt, of role 'tool' \('4'\)"),
        (NO_RESULTS, PAIR | {"prompt": [ASK, FOUR, RESULT]}, r"turn 3 of the prompt, of role 'tool' \('4'\)"),
        (ONLY_TALK, PAIR | {"chosen": [FOUR, RESULT, FOUR]}, r"`content` of turn 2 of `chosen` \('4'\)"),
        (ONLY_ANSWERS, PAIR | {"chosen": [FOUR, say("user", "4"), FOUR]}, r"`content` of turn 2 of `chosen` \('4'\)"),
        (ONLY_TALK, PAIR | {"tools": [tool("add")]}, "the tool 'add' of `tools`"),
        (ONLY_TALK, PAIR | {"tools": [{"type": "search"}]}, "the tool without a name of `tools`"),
        (
            WITH_CALLS + "{% if tools %}{{ tools[0].function.name }}{% endif %}",
            PAIR | {"tools": [tool("it"), tool("add")], "rejected": "it"},
            "the tool 'add' of `tools`",
        ),
    ],
)
def test_a_part_whose_text_occurs_elsewhere_is_missed(template: str, row: dict[str, Any], lost: str) -> None:
    load(template, PAIR)
    for rows in ([row], [PAIR, PAIR, row]):
        with pytest.raises(InputError, match=rf"row {len(rows)}: the chat template does not write {lost}"):
            load(template, *rows)


@pytest.mark.parametrize("arguments", [{"q": 2}, '{"q": 2}'], ids=["object", "JSON"])
def test_calls_of_the_prompt_that_are_not_written_are_refused(arguments: Any) -> None:
    row = PAIR | {"prompt": [ASK, call("add", arguments=arguments), RESULT]}
    assert len(load(WITH_CALLS, row)) == 1
    nothing, only_names = WITH_CALLS.replace(CALLS, ""), WITH_CALLS.replace(" {{ c.function.arguments }}", "")
    with pytest.raises(InputError, match=r"does not write `tool_calls\[0\]` of turn 2 of the prompt \('add'\)"):
        load(nothing, row)
    # The argument's name, "q", is a part of the question's text.
    with pytest.raises(InputError, match=r"does not write the arguments of `tool_calls\[0\]` of turn 2 of the prompt"):
        load(only_names, row)
    assert len(load(only_names, PAIR | {"prompt": [ASK, call("add", arguments="{}"), RESULT]})) == 1


def test_a_second_call_of_the_same_tool_is_missed() -> None:
    first = WITH_CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(InputError, match=r"does not write `tool_calls\[1\]` of turn 1 of `chosen` \('add'\)"):
        load(first, PAIR | {"chosen": [call("add", "add")]})
    with pytest.raises(InputError, match=r"does not write `tool_calls\[1\]` of turn 2 of the prompt \('add'\)"):
        load(first, PAIR | {"prompt": [ASK, call("add", "add"), RESULT]})
    assert len(load(WITH_CALLS, PAIR | {"prompt": [ASK, call("add", "add"), RESULT], "chosen": [call("a", "a")]})) == 1


@pytest.mark.parametrize("family", ["qwen25", "qwen3", "llama3", "mistral_v3", "gpt_oss", "deepseek_r1", "tool_tags"])
def test_families_that_write_calls_take_them_in_prompts(family: str) -> None:
    old = say("assistant", "hm", reasoning_content="old thinking that is dropped")
    row = PAIR | {"prompt": [ASK, old, ASK, call("add"), RESULT, FOUR, ASK], "rejected": "5", "chosen": "4"}
    assert len(load_preferences([row, row], build_tokenizer(family))) == 2


def test_what_a_template_refuses_in_the_place_of_content_is_looked_for_as_it_stands() -> None:
    strict = (
        "{% for m in messages if m.role == 'tool' and m.content != '4' %}{{ raise_exception('a number') }}{% endfor %}"
    )
    row = PAIR | {"prompt": [ASK, FOUR, RESULT]}
    assert len(load(strict + WITH_CALLS, row)) == 1
    # Other turns are still asked for one by one.
    with pytest.raises(InputError, match="turn 1 of the prompt, of role 'system'"):
        load(strict + WITH_CALLS.replace("'tool')", "'tool') if m.role != 'system'"), row | {"system": "Answer"})


def test_with_a_template_that_looks_at_other_texts_the_row_itself_decides() -> None:
    template = WITH_CALLS.replace("'tool')", "'tool') and (m.role != 'tool' or 'loud' in messages[0].content)")
    row = PAIR | {"prompt": [ASK, FOUR, RESULT]}
    loud = row | {"prompt": [say("user", "loud"), FOUR, RESULT]}
    assert len(load(template, loud, loud)) == 2
    with pytest.raises(InputError, match=r"row 3: .* turn 3 of the prompt, of role 'tool'"):
        load(template, loud, loud, row)


def test_each_form_of_conversation_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("qwen3")
    written: list[str] = []
    apply = tokenizer.apply_chat_template

    def count(messages: Any, **settings: Any) -> Any:
        written.append(json.dumps([messages, settings]))
        return apply(messages, **settings)

    monkeypatch.setattr(tokenizer, "apply_chat_template", count)
    rows = [
        PAIR | {"prompt": [say("system", f"{n}"), ASK], "chat_template_kwargs": {"enable_thinking": n < 20}}
        for n in range(40)
    ]
    load_preferences(rows, tokenizer)
    assert sum("mark" in text for text in written) == 2


@pytest.mark.parametrize(
    ("family", "settings", "name"),
    [
        ("qwen3", {"enable_thinkin": False}, "enable_thinkin"),
        ("qwen3", {"enable_thinking": False, "thinking": False}, "thinking"),
        ("chatml", {"enable_thinking": False}, "enable_thinking"),
    ],
)
def test_settings_that_the_template_never_reads_are_refused(family: str, settings: Any, name: str) -> None:
    row = PAIR | {"chat_template_kwargs": settings}
    with pytest.raises(
        InputError, match=f"row 2: `chat_template_kwargs` holds `{name}`, which the chat template never"
    ):
        load_preferences([PAIR, row], build_tokenizer(family))


def test_settings_may_be_those_of_any_of_several_templates() -> None:
    tokenizer = build_tokenizer("qwen3")
    both = {"default": tokenizer.chat_template, "tool_use": "{{ mood }}" + build_tokenizer("qwen25").chat_template}
    tokenizer.chat_template = both
    row = PAIR | {"chat_template_kwargs": {"mood": "x", "enable_thinking": False}}
    assert len(load_preferences([row, row | {"tools": [tool("add")]}], tokenizer)) == 2
    with pytest.raises(InputError, match="holds `moo`"):
        load_preferences([PAIR | {"chat_template_kwargs": {"moo": 1}}], tokenizer)
