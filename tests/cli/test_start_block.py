"""What `kvpref train` says before its first step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line_in_process import run
from preference_runs import make_groups
from transformers import AutoModelForCausalLM

from kvpref.cli import predicted_run, token_budget
from kvpref.cli.run_config import RunConfig
from kvpref.data import PreferenceDataset
from kvpref.losses import make_loss
from kvpref.training import PreferenceTrainingArguments

ON_CPU = ("--set", "use_cpu=true", "--batch-size", "4")


def block(text: str) -> dict[str, str]:
    """The block by label."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("model  "))
    found = (line.split("  ", 1) for line in lines[start : start + 11])
    return {label.strip(): value.strip() for label, value in found}


def test_everything_is_said_and_written_down(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run("train", trained_dir, pairs_file, "--output", output, "--json", *ON_CPU)
    captured = capsys.readouterr()
    assert "learning rate" not in captured.out  # standard output is for the result
    said, num_groups = block(captured.err), len(pairs_file.read_text().splitlines())
    model = AutoModelForCausalLM.from_pretrained(trained_dir)
    assert said["model"] == f"{trained_dir}, {model.num_parameters():,} parameters, all trained"
    assert said["precision"] == "float32 weights, no autocast"
    assert said["attention"] == f"auto takes cpu_flash (torch {torch.__version__})"
    assert said["loss"].startswith("dpo; reference: the model before training, log-probs stored")
    num_steps = -(-num_groups // 4)
    num_warmup = -(-num_steps // 10)
    assert said["learning rate"] == f"5e-07 (default for dpo and all weights), warmup steps: {num_warmup}, then cosine"
    assert said["data"].startswith(f"{num_groups} groups of 2 responses; tokens of a prompt: median 18, at most ")
    assert said["steps"] == f"{num_steps} of 4 groups; epochs: 1"
    assert said["micro-batches"] == "1 per step, of at most 8192 tokens (default)"
    assert float(said["saving"].removeprefix("at least ").split("x")[0]) > 1.3
    assert f"{16 * model.num_parameters() / 2**20:.3g} MiB of weights, gradients and optimizer state" in said["memory"]
    assert float(said["work"].split()[0]) > 0
    assert "FLOP/s of matrix products measured here" in said["work"]
    assert "peak" not in said["memory"]  # a short run is not held up by predicting it
    saved = yaml.safe_load((output / "run.yaml").read_text())["training"]
    assert (saved["learning_rate"], saved["num_train_epochs"], saved["warmup_steps"]) == (5e-7, 1.0, 0.1)
    assert (saved["bf16"], saved["max_tokens_per_micro_batch"]) == (False, "auto")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("backend=reference", f"reference (torch {torch.__version__})"),
        ("mode=padded", "transformers' sdpa (mode padded)"),
    ],
)
def test_what_attention_runs_on_is_said(
    setting: str, expected: str, trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", trained_dir, pairs_file, "--output", tmp_path / "out", "--max-steps", "1", "--set", setting, *ON_CPU)
    assert block(capsys.readouterr().err)["attention"] == expected


def test_what_was_given_is_told_from_what_was_chosen(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--learning-rate", "1e-3", "--max-tokens", "64", "--loss", "sft", "--lora-r", "2", "--max-steps", "2")
    run("train", trained_dir, pairs_file, "--output", tmp_path / "out", *given, *ON_CPU)
    said = block(capsys.readouterr().err)
    assert said["model"].endswith(" of them trained, an adapter")
    assert said["loss"] == "sft, no reference"
    assert said["learning rate"].startswith("0.001 (--learning-rate), warmup steps: 1, then")
    assert said["micro-batches"].endswith("of at most 64 tokens (--max-tokens)")


@pytest.mark.parametrize(("adapter", "share"), [((), 1), (("--lora-r", "2"), 2 / 3)], ids=["weights", "adapter"])
def test_a_long_run_is_told_its_least_time_and_its_peak(
    adapter: tuple[str, ...],
    share: float,
    trained_dir: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predicted_run, "measure_matrix_rate", lambda device, dtype: 1e3)  # slow enough
    steps = ("--loss", "sft", "--max-steps", "1", *adapter)
    run("train", trained_dir, pairs_file, "--output", tmp_path / "out", *steps, *ON_CPU)
    said = block(capsys.readouterr().err)
    flops = float(said["work"].split()[0])
    # 4 chosen answers of 18 + 3 tokens, 6 FLOPs for each weight that multiplies: less than half of them are embeddings.
    num_weights = AutoModelForCausalLM.from_pretrained(trained_dir).num_parameters()
    assert 0.5 < flops / (6 * 4 * 21 * num_weights * share) < 1.5
    assert 3600 < flops / 1e3 < 7200
    assert re.search(r"at least 1 h \d+ min at the 1e-06 GFLOP/s", said["work"]), said["work"]
    assert re.search(r"optimizer state, predicted peak [\d.]+ MiB$", said["memory"]), said["memory"]


def test_bf16_works_without_a_gpu_and_without_more_words(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", trained_dir, pairs_file, "--output", tmp_path / "out", "--bf16", "--max-steps", "1")
    assert block(capsys.readouterr().err)["precision"] == "float32 weights, bf16 autocast"


def test_a_resumed_run_keeps_what_was_chosen(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    steps = ("--max-steps", "4", "--save-steps", "2", "--loss", "kto")
    run("train", trained_dir, pairs_file, "--output", output, *steps, *ON_CPU)
    assert (
        "without a bound (the loss couples the groups of a micro-batch)"
        in block(capsys.readouterr().err)["micro-batches"]
    )
    for name in ("model.safetensors", "result.json"):
        (output / name).unlink(missing_ok=True)
    run("train", "--output", output, "--resume")
    said = block(capsys.readouterr().err)
    assert re.match(rf"5e-07 \({re.escape(str(output / 'run.yaml'))}:\d+: learning_rate\)", said["learning rate"])
    assert "without a bound" in said["micro-batches"]


def test_groups_beyond_the_budget_are_counted(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ("--schedule", "bounded", "--max-tokens", "10", "--max-steps", "1")
    run("train", trained_dir, pairs_file, "--output", tmp_path / "out", *limits, *ON_CPU)
    num_groups = len(pairs_file.read_text().splitlines())
    said = block(capsys.readouterr().err)["micro-batches"]
    assert said.startswith("4 per step, of at most 10 tokens")
    assert f"but for {num_groups} groups that take more and run alone, in chunks" in said


# What fits into a GPU


def fitting(trained_dir: Path, tmp_path: Path, free_bytes: int, loss: str = "dpo", **settings: Any) -> Any:
    args = PreferenceTrainingArguments(output_dir=str(tmp_path), use_cpu=True, loss=loss, **settings)
    model = AutoModelForCausalLM.from_pretrained(trained_dir)
    groups = PreferenceDataset(make_groups(6))
    run_config = RunConfig(model=str(trained_dir))
    return token_budget.fitting_budget(model, run_config, args, make_loss(loss), groups, free_bytes), groups


@pytest.mark.full
def test_the_budget_is_what_fits_and_at_least_the_largest_group(
    trained_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_budget, "RESERVE_BYTES", 0)
    plenty, groups = fitting(trained_dir, tmp_path, 2**33)
    largest = max(lengths.unique_tokens for lengths in groups.lengths)
    longest = max(lengths.total_tokens for lengths in groups.lengths)
    # A whole step of groups like the longest: more is never needed.
    assert 8 * largest <= plenty.max_tokens <= 8 * longest
    assert plenty.note.startswith("predicted peak ")
    assert plenty.note.endswith("of 8 GiB free")
    none, _ = fitting(trained_dir, tmp_path, 2**10)
    assert none.max_tokens == largest  # it must be tried, and the user told
    assert "--checkpoint all, --schedule bounded, or --lora-r 16" in none.note
    model = AutoModelForCausalLM.from_pretrained(trained_dir)
    some, _ = fitting(trained_dir, tmp_path, int(model.num_parameters() * 16 / token_budget.USED_SHARE) + 2**20)
    assert largest <= some.max_tokens < plenty.max_tokens


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"schedule": "bounded"}, "a chunk bounds memory"),
        ({"optim": "adafactor"}, "is not known"),
        ({"precompute_reference": False}, "a second model"),
        ({"loss": "bradley_terry"}, "reward models"),
    ],
)
def test_where_the_peak_is_not_known_the_default_stays(
    settings: dict[str, Any], reason: str, trained_dir: Path, tmp_path: Path
) -> None:
    found, _ = fitting(trained_dir, tmp_path, 2**33, **settings)
    assert found.max_tokens is None
    assert reason in found.note


def test_a_warmup_that_is_longer_than_the_run_is_told(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ("--max-steps", "2", "--set", "warmup_steps=5000")
    run("train", trained_dir, pairs_file, "--output", tmp_path / "out", *long, *ON_CPU)
    said = block(capsys.readouterr().err)["learning rate"]
    assert said.endswith("warmup steps: 5000, more than the run has: it never reaches its peak")
