"""docs/agent_trajectories.md: its commands run on the data that the example makes up, and say what the page says."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line_in_process import run
from markdown_pages import DOCS, ROOT, code_blocks, section
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpref
from kvpref.data import load_preferences

PAGE = DOCS / "agent_trajectories.md"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "order_desk.py"))


@pytest.fixture
def desk(example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the page works."""
    monkeypatch.chdir(tmp_path)
    example["write"](tmp_path / "desk")
    return tmp_path / "desk"


def commands(title: str) -> list[list[str]]:
    (block,) = [block for block in code_blocks(PAGE, "bash") if block in section(PAGE, title)]
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def load(path: str) -> list[kvpref.Group]:
    return list(load_preferences(path, AutoTokenizer.from_pretrained("desk/model")))


def gap(folder: str, groups: list[kvpref.Group]) -> float:
    """By how many nats per token the first attempt, which is good, is likelier than the others."""
    model = kvpref.attach(AutoModelForCausalLM.from_pretrained(folder).eval())
    with torch.no_grad():
        means = kvpref.response_logps(model, kvpref.collate(groups)).mean().view(-1, 4)
    return float((means[:, 0] - means[:, 1:].mean(1)).mean())


def _without_passes(text: str) -> str:
    return re.sub(r"\d+ pass(es)?", "passes", text)


def test_what_is_printed_and_drawn_is_on_the_page(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra kvpref[plot]")
    inspect, tree = commands("Look at it")
    run(*inspect)
    assert "turns per trajectory" in capsys.readouterr().out
    run(*tree)
    (printed,) = code_blocks(PAGE, "text")
    *lines, written = capsys.readouterr().out.splitlines()
    # In how many passes is the engine's choice, which may become a better one.
    assert [_without_passes(line) for line in lines] == [_without_passes(line) for line in printed.splitlines()]
    assert written == "written: desk/tree.svg"
    drawn = (desk / "tree.svg").read_text()
    kept = (DOCS / "agent_trajectories.svg").read_text()
    assert lines[1] in drawn
    assert _without_passes(lines[1]) in _without_passes(kept)
    for words in (lines[0], "attempt 1, score 1, 4 turns", "attempt 4, score 0, 1 turn", "in all 4 sequences"):
        assert words in drawn
        assert words in kept


def test_both_forms_are_the_same_groups(desk: Path, example: dict[str, Any]) -> None:
    whole, calls = load("desk/trajectories.jsonl"), load("desk/calls.jsonl")
    assert [group.sequences for group in whole] == [group.sequences for group in calls]
    assert [group.scores for group in whole] == [group.scores for group in calls] == [(1, 0, 0, 0)] * 24
    row = json.loads((desk / "trajectories.jsonl").read_text().splitlines()[3])
    tokenizer = AutoTokenizer.from_pretrained("desk/model")
    tokens = sum(
        len(tokenizer.apply_chat_template([*call["messages"], call["response"]], tools=call["tools"])["input_ids"])
        for call in example["calls_of"](row)
    )
    # The line break behind the end of a turn, one token, belongs to what follows.
    assert f"as one row per model call they would be {tokens - 10:,}" in " ".join(PAGE.read_text().split())


def test_its_training_makes_good_attempts_likelier(desk: Path) -> None:
    grpo, all_pairs = commands("Train")
    groups = load("desk/trajectories.jsonl")
    before = gap("desk/model", groups)
    run(*grpo, "--set", "use_cpu=true")
    assert gap("desk/grpo", groups) > before + 0.05
    run(*all_pairs, "--max-steps", 1, "--set", "use_cpu=true")


@pytest.mark.full
def test_bounded_trains_the_same_weights(desk: Path) -> None:
    (bounded,) = commands("Memory")
    run(*bounded, "--set", "use_cpu=true")
    full = bounded[: bounded.index("--schedule")]
    full[full.index("desk/bounded")] = "desk/full"
    run(*full, "--set", "use_cpu=true")
    groups = load("desk/trajectories.jsonl")
    # float32: sums in another order, through Adam.
    assert gap("desk/bounded", groups) == pytest.approx(gap("desk/full", groups), abs=1e-3)


def test_weights_count_the_third_turn_twice(desk: Path) -> None:
    (written,) = re.findall(r'`"(token_weights)": (\[.*?\])`', PAGE.read_text())
    row = json.loads(Path("desk/trajectories.jsonl").read_text().splitlines()[3])
    third = row["trajectories"][2]
    row["trajectories"] = [third | {written[0]: json.loads(written[1])}]
    (group,) = load_preferences([row], AutoTokenizer.from_pretrained("desk/model"))
    (sequence,) = group.sequences
    first, second, last = (stop - start for start, stop in sequence.turns)
    assert sequence.weights == (1.0,) * (first + second) + (2.0,) * last
