"""A full disk at each kind of write: one line, exit code 1, and what was there before is intact."""

from __future__ import annotations

import errno
import json
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import safetensors
import torch
import transformers
from command_line_in_process import fail, run
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerState

from kvpref.profiling.compare.report import Report
from kvpref.training.references import choice, stored
from kvpref.training.saving import is_complete

STEPS = ["--batch-size", 4, "--learning-rate", 1e-2, "--logging-steps", 1, "--set", "use_cpu=true"]
Break = Callable[[pytest.MonkeyPatch], None]


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def full_tensors(*args: Any, **kwargs: Any) -> None:
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_torch(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0")


def after_half(name: str) -> Break:
    """Path.write_text of this file, or of its partial copy, writes a half and fails."""
    original = pathlib.Path.write_text

    def write_text(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if self.name.endswith(name):
            original(self, text[: len(text) // 2], *args, **kwargs)
            full()
        return original(self, text, *args, **kwargs)

    return lambda patch: patch.setattr(pathlib.Path, "write_text", write_text)


def break_metrics(patch: pytest.MonkeyPatch) -> None:
    original = pathlib.Path.open

    def open_(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == "metrics.jsonl" and mode == "a":
            full()
        return original(self, mode, *args, **kwargs)

    patch.setattr(pathlib.Path, "open", open_)


IN_TRAINING: dict[str, tuple[Break, str]] = {
    "weights": (
        lambda patch: patch.setattr(transformers.modeling_utils, "safe_save_file", full_tensors),
        "cannot save",
    ),
    "optimizer": (lambda patch: patch.setattr(torch, "save", _unless_arguments(full_torch)), "cannot save"),
    "trainer state": (lambda patch: patch.setattr(TrainerState, "save_to_json", full), "cannot save"),
    "reference of a checkpoint": (lambda patch: patch.setattr(choice, "save_file", full_tensors), "cannot save"),
    "metrics": (break_metrics, "cannot save"),
    "reference log-probs": (
        lambda patch: patch.setattr(stored, "save_file", full_tensors),
        "cannot write the reference log-probs",
    ),
    "run.yaml": (after_half("run.yaml"), "cannot write"),
    "result": (after_half("result.json"), "cannot write"),
    "tokenizer": (
        lambda patch: patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full),
        "cannot save",
    ),
}


def _unless_arguments(instead: Callable[..., None]) -> Callable[..., None]:
    """The arguments are saved before the first step, too."""
    original = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        (original if str(path).endswith("training_args.bin") else instead)(value, path, *args, **kwargs)

    return save


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", IN_TRAINING)
def test_training(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The run goes on once there is room, from its last checkpoint, to where it would have come without."""
    breaks, message = IN_TRAINING[kind]
    arguments = ["train", trained_dir, pairs_file, "--output", tmp_path, *STEPS, "--max-steps", 4, "--save-steps", 2]
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch)
        error = fail(capsys, *arguments, code=1)
    assert message in error
    assert not list(tmp_path.rglob("*partial*"))
    assert all(is_complete(path) for path in tmp_path.glob("checkpoint-*"))
    run("train", trained_dir, pairs_file, "--output", tmp_path, *STEPS, *arguments[-4:], "--resume")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert load_file(tmp_path / "model.safetensors")


def test_an_earlier_run_is_intact(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last step's checkpoint fails; the one before it, the settings and the log are whole."""
    calls = []

    def fail_second(self: Any, path: str) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_text('{"half')
            full()
        original(self, path)

    original = TrainerState.save_to_json
    arguments = ["train", trained_dir, pairs_file, "--output", tmp_path, *STEPS, "--max-steps", 4, "--save-steps", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", fail_second)
        error = fail(capsys, *arguments, code=1)
    assert "at step 4: [Errno 28] No space left on device" in error
    assert "; earlier checkpoints are intact. " in error
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"], "what is left of 4 fills the disk"
    run(*arguments, "--resume")
    assert "resuming from checkpoint-2" in capsys.readouterr().err


def test_bad_rows(trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "some.jsonl"
    data.write_text(pairs_file.read_text() + '{"prompt": "one"}\n')
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        after_half("some.bad_rows.jsonl")(patch)
        arguments = ["train", trained_dir, data, "--output", output, *STEPS, "--max-steps", 1, "--on-bad-row", "skip"]
        error = fail(capsys, *arguments, code=1)
    assert f"cannot write {output / 'some.bad_rows.jsonl'}: No space left on device" in error


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_scores(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    output = tmp_path / f"scores.{suffix}"
    output.write_text("earlier scores")
    with pytest.MonkeyPatch.context() as patch:
        after_half("scores.jsonl")(patch)
        patch.setattr(pyarrow.parquet, "write_table", full)
        error = fail(capsys, "score", trained_dir, pairs_file, "--output", output, code=1)
    assert f"cannot write {output}: No space left on device; what was there before is intact" in error
    assert output.read_text() == "earlier scores"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("command", [["profile", "time"], ["profile", "memory"], ["bench"]], ids=" ".join)
def test_reports(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    name = "bench" if command == ["bench"] else command[1]
    options = ["--batch-size", 2, "--repeats", 1] if command == ["bench"] else ["--batch-size", 2]
    with pytest.MonkeyPatch.context() as patch:
        after_half(f"{name}.json")(patch)
        error = fail(capsys, *command, trained_dir, pairs_file, *options, "--output", tmp_path, code=1)
    assert f"cannot write {tmp_path / f'{name}.json'}: No space left on device" in error


def test_a_place_that_cannot_be_written_to_is_named_before_the_work(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below a file, since tests may run as root, whom a read-only folder does not stop."""
    place = tmp_path / "file" / "out"
    (tmp_path / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", lambda *args, **kwargs: pytest.fail("the work has begun"))
        patch.setattr(Report, "write", lambda *args: pytest.fail("late"))
        assert "cannot write there" in fail(capsys, "score", trained_dir, pairs_file, "--output", f"{place}.jsonl")
        for command in (["profile", "time"], ["profile", "memory"], ["bench"]):
            assert "cannot write there" in fail(capsys, *command, trained_dir, pairs_file, "--output", place)
        error = fail(capsys, "train", trained_dir, pairs_file, "--output", place, *STEPS)
    assert f"{tmp_path / 'file'}: is a file; --output takes a folder" in error
