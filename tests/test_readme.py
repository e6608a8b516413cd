"""README is short, its code runs as it stands there, and its figures are those of the measurements."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import command_line_in_process as cli
import pytest
from markdown_pages import README, code_blocks, section, tables
from transformers import AutoModelForCausalLM

MAX_WORDS = 1200


def test_it_is_one_page() -> None:
    assert len(README.read_text().split()) <= MAX_WORDS


def test_its_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", README.read_text()) if "://" not in target]
    assert len(targets) > 20
    assert [target for target in targets if not (README.parent / target).exists()] == []


def test_the_first_run_takes_twelve_lines_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = code_blocks(README, "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    first, *_, last = [line for line in names["trainer"].state.log_history if "loss" in line]
    assert last["step"] == 20
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] > first["rewards/margins"]
    AutoModelForCausalLM.from_pretrained("out")


@pytest.mark.full
def test_the_command_line_form_trains_on_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for block in code_blocks(README, "bash") if "kvpref demo" in block]
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        cli.run(*line.replace("--max-steps 20", "--max-steps 2").split()[1:])
    AutoModelForCausalLM.from_pretrained("out")


def test_the_switch_for_trl_imports() -> None:
    pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
    from kvpref.integrations import trl as kvpref_trl

    (diff,) = code_blocks(README, "diff")
    lines = diff.splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(line[1:] for line in lines if line.startswith("-")), names)
    theirs = names["DPOTrainer"]
    exec("\n".join(line[1:] for line in lines if line.startswith("+")), names)
    assert len(lines) == 3
    assert names["DPOTrainer"] is kvpref_trl.DPOTrainer is not theirs


def test_speedups_are_those_that_were_measured() -> None:
    path = README.parent / "benchmarks" / "results" / "train_step.json"
    measured = {row["name"]: row for row in json.loads(path.read_text())["comparisons"]}
    (table,) = tables(section(README, "Measured"))
    assert [row["data"].split(",")[0] for row in table] == ["hh_harmless", "gsm8k", "game24"]
    for row, name in zip(table, ("hh_harmless", "gsm8k", "game24 N=10"), strict=True):
        (found,) = [result for result in measured[name]["results"] if result["name"] == "two_pass"]
        assert row["measured"] == f"{found['speedup']['median']:.2f}x"
        assert row["the FLOPs allow"] == f"{found['ideal']:.2f}x"
        assert row["where"] == "CPU; not measured on a GPU"
