"""`kvpref train --num-processes`: how the ranks are started, and how all of them end when one fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import Run, environment
from command_line_in_process import fail
from forked_ranks import Ended, run_forked
from safetensors.torch import load_file

from kvpref.cli.starting_ranks import without_number

LOSS = Path(__file__).parents[1] / "failing_loss.py"
NUM_STEPS = 4


def arguments(model: Path, data: Path, output: Path, *more: object, **settings: object) -> list[object]:
    """Two ranks, two groups each per step; the loss fails as `settings` say."""
    return [
        *("train", model, data, "--num-processes", 2, "--output", output, "--batch-size", 2),
        *("--loss", f"{LOSS}:failing", "--max-steps", NUM_STEPS, "--learning-rate", 1e-2),
        *("--logging-steps", 1, "--save-steps", 1, "--set", "use_cpu=true", "--set", "disable_tqdm=true"),
        *(part for name, value in settings.items() for part in ("--loss-arg", f"{name}={value}")),
        *more,
    ]


def said(stderr: str) -> str:
    """The one line that says how the run ended."""
    assert "Traceback" not in stderr, stderr
    (line,) = (line for line in stderr.splitlines() if line.startswith(("error: ", "stopped ")))
    return line


CASES = {
    "nan": (1, "error: loss 'failing': the loss is nan at optimizer step 2: on rank 1, "),
    "run_error": (1, "error: rank 1: cannot save: no space left"),
    "bad_row": (2, "error: rank 1: pairs.jsonl:7: no such picture"),
    "interrupted": (130, "stopped after step "),
}
"""By how rank 1 fails in its second step: the exit code, and how the one message begins."""


def write_bad_row(path: Path) -> Path:
    path.write_text("{\n")
    return path


def make_earlier_run(output: Path) -> Path:
    """A folder as of a run, with reference log-probs that cannot be read."""
    (output / "reference_logps").mkdir(parents=True)
    (output / "reference_logps" / "train.safetensors").write_text("of another model")
    (output / "run.yaml").write_text("data: pairs.jsonl\noutput: out\ntraining: {}\n")
    (output / "checkpoint-9").mkdir()
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ended(trained_dir: Path, pairs_file: Path, folder: Path) -> dict[str, Ended]:
    """All runs of this file, since a start costs most."""
    once = {"failure": "killed", "at": 3, "marker": folder / "killed"}  # the marker is there afterwards
    jobs = {
        "killed": arguments(trained_dir, pairs_file, folder / "parts", **once),
        "resumed": arguments(trained_dir, pairs_file, folder / "parts", "--resume", **once),
        "whole": arguments(trained_dir, pairs_file, folder / "whole", **once),
        "unreadable": arguments(trained_dir, write_bad_row(folder / "bad.jsonl"), folder / "out"),
        "overwritten": [
            *("train", trained_dir, pairs_file, "--output", make_earlier_run(folder / "old"), "--overwrite"),
            *("--num-processes", 2, "--max-steps", 1, "--set", "use_cpu=true", "--set", "disable_tqdm=true"),
        ],
        "bug": arguments(trained_dir, pairs_file, folder / "bug", failure="bug", at=1, rank=0),
        **{name: arguments(trained_dir, pairs_file, folder / name, failure=name, at=2) for name in CASES},
    }
    return dict(zip(jobs, run_forked(folder, *jobs.values()), strict=True))


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_goes_on_to_the_same_weights(ended: dict[str, Ended], folder: Path) -> None:
    assert ended["killed"].code == 128 + 9
    assert said(ended["killed"].stderr) == (
        "error: rank 1 was killed (signal 9, SIGKILL: often the kernel, when the machine's memory is full); the other "
        "ranks were ended; earlier checkpoints are intact, continue with --resume"
    )
    assert ended["resumed"].code == 0, ended["resumed"].stderr
    assert ended["whole"].code == 0, ended["whole"].stderr
    final, expected = (load_file(folder / name / "model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(final[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_one_log(ended: dict[str, Ended], folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    for line in (line for line in lines if "loss" in line):
        assert line["peak_memory_rank"] in (0, 1)
        assert line["rank_imbalance"] >= 1
        assert line["idle_seconds"] >= 0
    assert ended["whole"].stderr.count("saved the model to") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_message_names_the_rank(name: str, ended: dict[str, Ended], folder: Path) -> None:
    code, message = CASES[name]
    assert ended[name].code == code, ended[name].stderr
    assert said(ended[name].stderr).startswith(message)
    assert not (folder / name / "model.safetensors").exists()


@pytest.mark.slow
def test_what_all_ranks_meet_is_said_once(ended: dict[str, Ended], folder: Path) -> None:
    assert ended["unreadable"].code == 2
    assert said(ended["unreadable"].stderr).startswith(f"error: {folder / 'bad.jsonl'}:1: ")


@pytest.mark.slow
def test_an_earlier_run_is_deleted_once_and_before_any_rank_goes_on(ended: dict[str, Ended], folder: Path) -> None:
    assert ended["overwritten"].code == 0, ended["overwritten"].stderr
    assert [path.name for path in (folder / "old").glob("checkpoint-*")] == ["checkpoint-1"]
    assert (folder / "old" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_bug_shows_where_it_is_once(ended: dict[str, Ended]) -> None:
    stderr = ended["bug"].stderr
    assert ended["bug"].code == 1
    assert stderr.count("Traceback (most recent call last)") == 1
    assert "error: rank 0: Traceback" in stderr
    assert "KeyError: 'no such thing'" in stderr


@pytest.mark.full
def test_in_processes_of_their_own(kvpref_command: Run, trained_dir: Path, tmp_path: Path) -> None:
    done = kvpref_command(*arguments(trained_dir, write_bad_row(tmp_path / "bad.jsonl"), tmp_path / "out"))
    assert done.returncode == 2, done.stderr
    assert said(done.stderr).startswith(f"error: {tmp_path / 'bad.jsonl'}:1: ")


@pytest.mark.full
def test_torchrun(trained_dir: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Its own table follows the message."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "kvpref"]
    own = arguments(trained_dir, pairs_file, tmp_path / "out", failure="nan", at=2)
    done = subprocess.run(
        [*command, *without_number([str(argument) for argument in own])],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith(("error: ", "stopped ")))
    assert line.startswith("error: loss 'failing': the loss is nan at optimizer step 2: on rank 1, ")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("train m d --num-processes 8 --output o", "train m d --output o"),
        ("train m d --num_processes 8 --output o", "train m d --output o"),
        ("train m d --output o --num-processes=8", "train m d --output o"),
        ("train m d --output o", "train m d --output o"),
    ],
)
def test_ranks_do_not_start_others(given: str, kept: str) -> None:
    assert without_number(given.split()) == kept.split()


def test_what_cannot_be_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = ("train", "org/model", "org/data", "--output", tmp_path / "out")
    assert "must be at least 1; got 0" in fail(capsys, *train, "--num-processes", 0)
    assert "there is no file 'fsdp'" in fail(capsys, *train, "--num-processes", 2, "--accelerate-config", "fsdp")
    assert "does not say how many processes" in fail(capsys, *train, "--accelerate-config", "fsdp2")
    machines = tmp_path / "machines.yaml"
    machines.write_text("distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 16\n")
    assert "is for 2 machines; start kvpref train with" in fail(capsys, *train, "--accelerate-config", machines)
    other = tmp_path / "megatron.yaml"
    other.write_text("distributed_type: MEGATRON_LM\n")
    message = fail(capsys, *train, "--num-processes", 2, "--accelerate-config", other)
    assert "got MEGATRON_LM" in message
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 were started already (WORLD_SIZE)" in fail(capsys, *train, "--num-processes", 2)
    assert not (tmp_path / "out").exists()
