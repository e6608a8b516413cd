"""Scored tokens against the masks of templates that mark themselves what the model generates (TRL's training ones)."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from chat_families import build_byte_tokenizer

from kvpref.data import load_preferences

NAMES = (
    "cohere_training",
    "gemma_training",
    "lfm2_v2_training",
    "llama3_training",
    "phi3_training",
    "qwen3_instruct_2507_training",
    "qwen3_training",
)
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "It is <b>4</b>!"}
ASKS_BACK = [{"role": "assistant", "content": "ten?"}, {"role": "user", "content": "yes"}, ANSWER]
CALLS = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"left": 2, "right": 2}}}],
    },
    {"role": "tool", "name": "add", "content": '{"sum": 4}'},
    ANSWER,
]


@functools.cache
def tokenizer_of(name: str) -> Any:
    package = importlib.util.find_spec("trl")
    if package is None or not package.submodule_search_locations:
        pytest.skip("TRL is not installed")
    path = Path(package.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this release of TRL has no template {name}")
    template = path.read_text()
    specials = re.findall(r"<\|[^<>|{}' ]*\|>|<start_of_turn>|<end_of_turn>", template)
    return build_byte_tokenizer(
        {"<bos>", "<eos>", *specials}, bos_token="<bos>", eos_token="<eos>", chat_template=template
    )


WRITE_TOOL_CALLS = [name for name in NAMES if name.startswith(("qwen3", "lfm2"))]


@pytest.mark.parametrize(
    ("name", "response"),
    [
        *(pytest.param(name, [ANSWER], id=f"{name}, single") for name in NAMES),
        *(pytest.param(name, ASKS_BACK, id=f"{name}, asks back") for name in NAMES),
        *(pytest.param(name, CALLS, id=f"{name}, calls") for name in WRITE_TOOL_CALLS),
    ],
)
def test_scored_tokens_are_those_that_the_template_marks(name, response, write_jsonl):
    tokenizer = tokenizer_of(name)
    prompt = [USER, {"role": "assistant", "content": "which base?"}, USER]
    [group] = load_preferences(write_jsonl({"prompt": prompt, "responses": [response]}), tokenizer)
    [sequence] = group.sequences
    marked = tokenizer.apply_chat_template(
        [*prompt, *response], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = marked["input_ids"], [flag == 1 for flag in marked["assistant_masks"]]
    assert list(sequence.input_ids[: len(ids)]) == ids
    # Earlier answers are marked, too, and belong to the prompt here.
    begin = sequence.scored.index(True)
    assert not any(mask[index] for index in range(begin - 5, begin))
    assert list(sequence.scored[begin : len(ids)]) == mask[begin:]
    assert any(mask[begin:])
