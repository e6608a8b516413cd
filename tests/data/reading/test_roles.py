"""Roles that are known ones misspelt."""

from __future__ import annotations

from typing import Any

import pytest

from kvpref.data import load_preferences
from kvpref.errors import InputError

USER = {"role": "user", "content": "hi"}
GOOD, POOR = ({"role": "assistant", "content": text} for text in ("hello", "go away"))
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(build_tokenizer: Any) -> Any:
    return build_tokenizer(chat_template=CHATML)


@pytest.mark.parametrize(("role", "meant"), [("asistant", "assistant"), ("Assistant", "assistant"), ("usr", "user")])
def test_a_misspelt_role_is_named_with_its_line(role: str, meant: str, tokenizer: Any, write_jsonl: Any) -> None:
    prompt = [USER, {"role": role, "content": "yes?"}, USER]
    good = {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]}
    path = write_jsonl(good, good | {"prompt": prompt})
    with pytest.raises(InputError, match=rf"{path}:2: turn 2 of the prompt has the role '{role}'.*{meant}"):
        load_preferences(path, tokenizer)


def test_a_misspelt_role_in_a_response_would_not_be_scored(tokenizer: Any, write_jsonl: Any) -> None:
    turns = [GOOD, USER, {"role": "assistent", "content": "well"}]
    path = write_jsonl({"prompt": [USER], "chosen": turns, "rejected": [POOR]})
    with pytest.raises(InputError, match="turn 3 of `chosen` has the role 'assistent'"):
        load_preferences(path, tokenizer)


def test_a_misspelt_role_in_a_trajectory_would_not_be_scored(tokenizer: Any, write_jsonl: Any) -> None:
    messages = [USER, {"role": "asistant", "content": "yes?"}, USER, GOOD]
    path = write_jsonl({"trajectories": [{"messages": messages}]})
    with pytest.raises(InputError, match="has the role 'asistant'"):
        load_preferences(path, tokenizer)


@pytest.mark.parametrize("role", ["developer", "tool", "ipython", "tools", "observation", "documents", "critic"])
def test_other_roles_are_left_to_the_template(role: str, tokenizer: Any, write_jsonl: Any) -> None:
    prompt = [USER, GOOD, {"role": role, "content": "well"}]
    path = write_jsonl({"prompt": prompt, "chosen": [GOOD], "rejected": [POOR]})
    [group] = load_preferences(path, tokenizer)
    assert f"{role}\nwell" in tokenizer.decode(group.sequences[0].input_ids)


def test_a_role_that_the_template_names_is_meant(build_tokenizer: Any, write_jsonl: Any) -> None:
    tokenizer = build_tokenizer(chat_template="{# roles: usr, assistant #}" + CHATML)
    prompt = [{"role": "usr", "content": "hi"}]
    [group] = load_preferences(write_jsonl({"prompt": prompt, "chosen": [GOOD], "rejected": [POOR]}), tokenizer)
    assert "usr\nhi" in tokenizer.decode(group.sequences[0].input_ids)
