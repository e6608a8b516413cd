"""`--early-stopping-patience`: when a run stops, with which model, and what the option needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line_in_process import fail, run
from safetensors.torch import load_file

from kvpref.cli.early_stopping import with_early_stopping
from kvpref.cli.run_config import RunConfig
from kvpref.errors import InputError

# Trained on answers that the evaluation data calls the worse ones: every step raises its loss.
SETTINGS = [
    *("--loss", "ipo", "--batch-size", 4, "--learning-rate", 1e-3, "--max-steps", 12, "--eval-steps", 2),
    *("--early-stopping-patience", 2, "--set", "lr_scheduler_type=constant", "--set", "warmup_steps=0"),
    *("--set", "use_cpu=true"),
]


@pytest.fixture(scope="module")
def swapped_file(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("swapped") / "swapped.jsonl"
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    return path


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text())


def test_a_run_stops_and_keeps_its_best_model(
    trained_dir: Path, pairs_file: Path, swapped_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run("train", trained_dir, pairs_file, "--eval-data", swapped_file, "--output", output, *SETTINGS)
    # The first evaluation, at step 2, is the best; those at steps 4 and 6 are the two that are not.
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    last = state(output / "checkpoint-6")
    assert last["best_metric"] == min(log["eval_loss"] for log in last["log_history"] if "eval_loss" in log)
    best, saved = load_file(output / "checkpoint-2" / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(best[name], saved[name]) for name in best)


def test_a_resumed_run_goes_on_counting(
    trained_dir: Path, pairs_file: Path, swapped_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    keep_all = ("--set", "save_total_limit=9")
    run("train", trained_dir, pairs_file, "--eval-data", swapped_file, "--output", output, *SETTINGS, *keep_all)
    assert (output / "checkpoint-6").is_dir()
    shutil.rmtree(output / "checkpoint-6")
    for name in ("model.safetensors", "result.json"):
        (output / name).unlink()
    run("train", "--output", output, "--resume")
    steps = sorted(int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*"))
    assert steps == [2, 4, 6]


NEEDS = {
    "data": ({}, "there is no data to evaluate on; give --eval-data"),
    "evaluations": ({"eval_data": "e"}, "counts evaluations during training; give --eval-steps"),
    "the best model": (
        {"eval_data": "e", "training": {"eval_steps": 2, "load_best_model_at_end": False}},
        "keeps the best model; leave load_best_model_at_end out",
    ),
}


@pytest.mark.parametrize("what", NEEDS)
def test_it_says_what_it_needs(what: str) -> None:
    settings, message = NEEDS[what]
    with pytest.raises(InputError, match=r"^--early-stopping-patience: ") as caught:
        with_early_stopping(RunConfig(early_stopping_patience=2, **settings))
    assert message in str(caught.value)


def test_what_is_given_stays() -> None:
    assert with_early_stopping(RunConfig()) == RunConfig()
    given = {"eval_steps": 2, "save_steps": 4, "metric_for_best_model": "accuracy"}
    run = with_early_stopping(RunConfig(early_stopping_patience=2, eval_data="e", training=given))
    assert given.items() <= run.training.items()
    assert run.training["load_best_model_at_end"] is True
    run = with_early_stopping(RunConfig(early_stopping_patience=2, eval_data="e", training={"eval_strategy": "epoch"}))
    assert (run.training["save_strategy"], run.training["metric_for_best_model"]) == ("epoch", "eval_loss")


def test_without_evaluations_nothing_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fail(capsys, "train", "org/model", "org/data", "--output", tmp_path / "out", "--early-stopping-patience", 0)
    assert "--early-stopping-patience: expected a number of at least 1; got 0" in error
