"""Conversations whose response cannot be told or would be lost in part: exit code 2, one line with file and row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chat_families import build_tokenizer
from command_line_in_process import fail, run

USER = {"role": "user", "content": "2+2?"}
GOOD = {"prompt": [USER], "chosen": "4", "rejected": "5"}
MARKS_THE_LAST_QUESTION = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last %}[SYS]{% endif %}Q:{{ m.content }} "
    "{% else %}A:{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        (GOOD, MARKS_THE_LAST_QUESTION, r"rows\.jsonl:1: .*before the answer differently"),
        (GOOD | {"rejected": [USER]}, None, r"rows\.jsonl:2: `rejected` begins with a turn of role 'user'"),
        (GOOD | {"rejected": [CALL]}, None, r"rows\.jsonl:2: .*`tool_calls\[0\]` of turn 1 of `rejected` \('add'\)"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, capsys, row, template, message) -> None:
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n")
    error = fail(capsys, "data", "inspect", data, "--tokenizer", tmp_path / "tokenizer")
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1
    if template is None:
        run("data", "inspect", data, "--tokenizer", tmp_path / "tokenizer", "--on-bad-row", "skip")
        assert re.search(message, capsys.readouterr().out), "the report names the row"
