"""`kvpref demo --quick` from data to picture; no timings are asserted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpref.data import load_preferences
from kvpref.demo.config import DemoConfig
from kvpref.demo.run import run_demo
from kvpref.errors import InputError


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kvpref", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=1200)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "new" / "folder"


@pytest.fixture(scope="module")
def finished(output: Path) -> subprocess.CompletedProcess[str]:
    run = run_command("--quick", "--json", "--output", str(output))
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def result(finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def test_json_has_finite_numbers(result: dict[str, Any]) -> None:
    found = list(numbers(result))
    assert len(found) > 30
    assert all(math.isfinite(number) for number in found)
    assert set(result["evaluations"]) == {"start", "sft", "dpo"}
    assert result["reward_margins"]["sft"] == 0


def test_progress_is_not_on_stdout(finished: subprocess.CompletedProcess[str]) -> None:
    assert "step 1 of" in finished.stderr
    assert "step 1 of" not in finished.stdout


def test_modes_agree(result: dict[str, Any]) -> None:
    # fp32: a log-prob of a few nats is off by some 1e-6, and the loss is a mean of such differences.
    assert result["comparison"]["max_loss_difference"] < 1e-4
    # Gradients add thousands of rounded terms in another order; a prompt left out would be off by about 1.
    assert result["comparison"]["max_gradient_difference"] < 1e-3


def test_shared_prompts_run_once(result: dict[str, Any]) -> None:
    tokens = {cost["mode"]: cost["num_forward_tokens"] for cost in result["comparison"]["costs"]}
    # Pairs with prompts of 60 tokens and more against responses of 3: nearly half of all tokens are repeats.
    assert 1.8 < tokens["packed"] / tokens["two_pass"] < 2
    assert tokens["packed"] <= tokens["padded"]


def test_saved_model_loads_without_kvpref(output: Path, result: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    group = load_preferences(str(output / "eval.jsonl"), tokenizer)[0]
    ids = torch.tensor([group.sequences[0].input_ids])
    assert tokenizer.unk_token_id not in ids
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()


def test_files_are_written(output: Path, result: dict[str, Any]) -> None:
    for name in ("train.jsonl", "eval.jsonl", "demo.json", "sft/metrics.jsonl", "dpo/metrics.jsonl"):
        assert (output / name).stat().st_size > 0


def test_picture_is_drawn(output: Path, result: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_again_in_the_same_folder_without_matplotlib(
    output: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines: list[str] = []
    again = run_demo(DemoConfig.quick(), output, report=lines.append)
    assert any("matplotlib is not installed" in line for line in lines)
    assert not (output / "demo.png").exists()
    for stage, curve in result["loss_curves"].items():
        # The same seed; only threads may round differently from the first run.
        assert [loss for _, loss in again.loss_curves[stage]] == pytest.approx([loss for _, loss in curve], rel=1e-3)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = run_command("--quick", "--output", str(tmp_path))
    assert run.returncode == 2
    assert "not empty" in run.stderr
    assert "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        run_demo(DemoConfig.quick(), path, report=lambda line: None)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="num_sft_steps must be positive; got 0"):
        DemoConfig(num_sft_steps=0)
