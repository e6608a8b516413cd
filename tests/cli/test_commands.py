"""The commands end to end, in fresh processes where that is the point."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from command_line import Run, command_line, environment
from command_line_in_process import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `--json` writes."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_help_needs_no_heavy_imports() -> None:
    # Importing torch or transformers alone takes seconds; --help must answer within one.
    code = "import sys, kvpref.cli; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("launcher", [["-m", "kvpref"], [str(ROOT / "cli.py")]])
def test_launchers(launcher: list[str]) -> None:
    done = subprocess.run([sys.executable, *launcher, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().count(".") == 2


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["eval"],
        ["score"],
        ["losses"],
        ["check"],
        ["data", "inspect"],
        ["data", "tree"],
        ["profile", "memory"],
        ["profile", "time"],
        ["plan"],
        ["demo"],
    ],
)
def test_every_command_has_an_example(command: list[str], kvpref_command: Run) -> None:
    done = kvpref_command(*command, "--help")
    assert done.returncode == 0
    assert f"Example: kvpref {' '.join(command)}" in done.stdout


def test_train_saves_a_model_and_how_it_was_made(trained_dir: Path) -> None:
    names = {path.name for path in trained_dir.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "run.yaml", "metrics.jsonl"} <= names
    assert "kvpref" not in (trained_dir / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(trained_dir)
    assert model(input_ids=torch.tensor([[2, 3]])).logits.isfinite().all()


def test_train_repeats_from_the_saved_run_file(trained_dir: Path, tmp_path: Path, kvpref_command: Run) -> None:
    done = kvpref_command("train", "--config", trained_dir / "run.yaml", "--output", tmp_path / "again", "--json")
    assert done.returncode == 0, done.stderr
    again, first = load_file(tmp_path / "again" / "model.safetensors"), load_file(trained_dir / "model.safetensors")
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert math.isfinite(json.loads(done.stdout.splitlines()[-1])["train_loss"])


@pytest.mark.full
def test_full_disk_keeps_what_was_saved(
    tmp_path: Path, kvpref_command: Run, trained_dir: Path, pairs_file: Path
) -> None:
    output = tmp_path / "out"
    arguments = ["train", trained_dir, pairs_file, "--output", output, "--batch-size", 4, "--max-steps", 4]
    arguments += ["--save-steps", 2, "--set", "use_cpu=true"]
    assert kvpref_command(*arguments).returncode == 0
    saved = (output / "checkpoint-2" / "model.safetensors").read_bytes()
    # As if it had been killed after its second step.
    shutil.rmtree(output / "checkpoint-4")
    (output / "model.safetensors").unlink()
    # A limit on the size of files fails writes just as a full disk does.
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash", *command_line("train", "--output", output, "--resume")]
    done = subprocess.run(limited, capture_output=True, text=True, env=environment(), timeout=1200, check=False)
    assert done.returncode == 1, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "cannot save to" in error
    assert "continue with --resume" in error
    assert (output / "checkpoint-2" / "model.safetensors").read_bytes() == saved


def test_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    from kvpref.cli.checkpoints import find_checkpoint

    for step, state in ((3, '{"global_step": 3}'), (6, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-best").mkdir()  # not of a run
    lines: list[str] = []
    assert find_checkpoint(tmp_path, lines.append) == str(tmp_path / "checkpoint-3")
    assert lines == [
        "checkpoint-12 is incomplete and is passed over",
        "checkpoint-6 is incomplete and is passed over",
        "resuming from checkpoint-3",
    ]


def test_bad_rows_are_skipped_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained_dir: Path, pairs_file: Path
) -> None:
    data = tmp_path / "some_bad.jsonl"
    data.write_text(pairs_file.read_text() + '{"prompt": "one"}\n')
    output = tmp_path / "out"
    run("train", trained_dir, data, "--output", output, "--max-steps", 1, "--on-bad-row", "skip")
    assert "24 groups; 1 bad rows skipped" in capsys.readouterr().err
    (listed,) = (json.loads(line) for line in (output / "some_bad.bad_rows.jsonl").read_text().splitlines())
    assert listed["location"].endswith("some_bad.jsonl:25")


@pytest.mark.parametrize("suffix", ["jsonl", pytest.param("parquet", marks=pytest.mark.full)])
def test_score_writes_each_response(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str], trained_dir: Path, pairs_file: Path
) -> None:
    output = tmp_path / f"scores.{suffix}"
    run("score", trained_dir, pairs_file, "--output", output, "--json")
    assert last_line(capsys)["num_sequences"] == 48
    if suffix == "jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        rows = pyarrow.parquet.read_table(output).to_pylist()
    assert [(row["group"], row["response"]) for row in rows] == [(g, r) for g in range(24) for r in range(2)]
    model = AutoModelForCausalLM.from_pretrained(trained_dir)
    # Row 0 by hand: "one ... eight" (18 words from "one" on), then " one two" and EOS.
    prompt = [2 + step % 10 for step in range(18)]
    input_ids = torch.tensor([[*prompt, 2, 3, 0]])
    logps = model(input_ids=input_ids).logits.float().log_softmax(-1)
    expected = sum(logps[0, position - 1, input_ids[0, position]].item() for position in (18, 19, 20))
    assert rows[0]["num_tokens"] == 3
    # float32, two orders of summation
    assert rows[0]["sum_logp"] == pytest.approx(expected, abs=1e-4)
    assert rows[0]["mean_logp"] == pytest.approx(expected / 3, abs=1e-4)


def test_check_reads_the_configuration_only(capsys: pytest.CaptureFixture[str], config_file: Path) -> None:
    run("check", "--model-config", config_file, "--json")
    result = last_line(capsys)
    assert result | {"model": str(config_file), "supported": True, "model_type": "llama"} == result
    assert [row["rule"] for row in result["layers"]] == [["causal"]]


def test_check_numeric_compares_with_the_naive_forward(capsys: pytest.CaptureFixture[str], trained_dir: Path) -> None:
    run("check", trained_dir, "--numeric", "--json")
    result = last_line(capsys)
    assert 0 < result["max_logp_error"] < 1e-4
    assert 0 < result["max_gradient_error"] < 1e-3
