"""Ctrl-C and SIGTERM: the step is finished and saved, one line says how to go on, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line_in_process import run, stopped
from safetensors.torch import load_file
from transformers import TrainerCallback

import kvpref
from kvpref.cli import interrupts, loading, training_run
from kvpref.training import PreferenceTrainer

STEPS = ["--max-steps", 8, "--batch-size", 4, "--learning-rate", 1e-2, "--logging-steps", 1, "--set", "use_cpu=true"]


class At(TrainerCallback):
    """Does something at an event of the trainer, once."""

    def __init__(self, event: str, step: int, action: Callable[[], None]) -> None:
        def do(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                action()

        setattr(self, event, do)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, Callable[[], None]], None]:
    """Lets every trainer of the command line do something at an event and step."""

    def add(event: str, step: int, action: Callable[[], None]) -> None:
        class Acting(PreferenceTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.add_callback(At(event, step, action))

        monkeypatch.setattr(training_run, "PreferenceTrainer", Acting)

    return add


def send(*numbers: signal.Signals) -> Callable[[], None]:
    def action() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return action


def losses(output: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_end(
    trained_dir: Path,
    pairs_file: Path,
    tmp_path: Path,
    at: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "the parts"
    run("train", trained_dir, pairs_file, "--output", whole, *STEPS)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context():
        at("on_step_begin", 2, send(number, number))  # at once again, as torchrun repeats it: one wish
        line = stopped(capsys, "train", trained_dir, pairs_file, "--output", parts, *STEPS, code=128 + number)
    monkeypatch.setattr(training_run, "PreferenceTrainer", PreferenceTrainer)
    assert (
        line == f"stopped after step 3, saved as checkpoint-3; continue with: kvpref train --output '{parts}' --resume"
    )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not (parts / "model.safetensors").exists()
    run("train", "--output", parts, "--resume")
    final, expected = load_file(parts / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(final[name], expected[name]) for name in expected)
    assert losses(parts) == losses(whole)


def test_where_nothing_is_saved_it_says_so(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    at("on_step_begin", 2, send(signal.SIGINT))
    arguments = ["train", trained_dir, pairs_file, "--output", tmp_path, *STEPS, "--set", "save_strategy=no"]
    assert stopped(capsys, *arguments, code=130) == (
        "stopped after step 3; save_strategy is no, so nothing of this run is kept"
    )
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("save_steps", [2, 200], ids=["a checkpoint", "none"])
def test_a_second_signal_stops_at_once(
    trained_dir: Path,
    pairs_file: Path,
    tmp_path: Path,
    at: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    save_steps: int,
) -> None:
    monkeypatch.setattr(interrupts, "SAME_REQUEST_S", 0.0)
    at("on_step_begin", 2, send(signal.SIGINT, signal.SIGINT))
    arguments = ["train", trained_dir, pairs_file, "--output", tmp_path, *STEPS, "--save-steps", save_steps]
    line = stopped(capsys, *arguments, code=130)
    assert line.startswith("stopped at once; ")
    assert ("--resume" in line) == (save_steps == 2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == (["checkpoint-2"] if save_steps == 2 else [])


def test_before_the_first_step_there_is_nothing_to_finish(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(kvpref.training.references.References, "prepare", lambda *a: send(signal.SIGINT)())
    line = stopped(capsys, "train", trained_dir, pairs_file, "--output", tmp_path, *STEPS, code=130)
    assert line == "stopped before training began; nothing was saved"


def test_an_interrupt_at_the_end_of_an_epoch_saves_once(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    saves: list[int] = []
    at("on_step_begin", 5, send(signal.SIGINT))  # the sixth step of 24 groups, four at a time, is an epoch's last

    def count(self: Any, *args: Any) -> None:
        saves.append(self.state.global_step)
        original(self, *args)

    original = PreferenceTrainer._save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreferenceTrainer, "_save_checkpoint", count)
        arguments = ["train", trained_dir, pairs_file, "--output", tmp_path, *STEPS, "--set", "save_strategy=epoch"]
        stopped(capsys, *arguments, code=130)
    assert saves == [6]


@pytest.mark.parametrize("where", ["load_trained_model", "load_data", "check_early"])
def test_before_training_begins_one_line_is_said_and_no_folder_is_left(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, where: str
) -> None:
    monkeypatch.setattr(training_run, where, lambda *args: send(signal.SIGINT)())
    output = tmp_path / "out"
    line = stopped(capsys, "train", trained_dir, pairs_file, "--output", output, *STEPS, code=130)
    assert line == "stopped before training began; nothing was saved"
    assert not output.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_while_the_libraries_are_imported(
    trained_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Interrupting:
        def find_spec(self, name: str, *args: Any) -> None:
            if name == training_run.__name__:
                send(signal.SIGINT)()

    monkeypatch.delitem(sys.modules, training_run.__name__)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    line = stopped(capsys, "train", trained_dir, "org/data", "--output", tmp_path / "out", code=130)
    assert line == "stopped before training began; nothing was saved"


def test_other_commands_say_that_they_were_stopped(
    trained_dir: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(loading, "load_config", lambda *args: send(signal.SIGINT)())
    lengths = ["--prompt-tokens", 8, "--response-tokens", 8, "--num-responses", 2]
    line = stopped(capsys, "plan", trained_dir, "--gpu-memory", "8GiB", *lengths, code=130)
    assert line == "stopped by Ctrl-C"
