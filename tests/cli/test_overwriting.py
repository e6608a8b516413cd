"""`--overwrite` deletes what an earlier run wrote, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command_line_in_process import fail, run
from safetensors.torch import load_file

from kvpref.cli.overwriting import delete_earlier_run, find_earlier_run

SETTINGS = ("--loss", "ipo", "--batch-size", 4, "--save-steps", 1, "--set", "use_cpu=true")


def test_a_run_takes_the_place_of_another(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run("train", trained_dir, pairs_file, "--output", output, "--max-steps", 2, *SETTINGS)
    first = load_file(output / "model.safetensors")
    (output / "notes.txt").write_text("mine")

    again = ("train", trained_dir, pairs_file, "--output", output, "--max-steps", 1, "--learning-rate", 1e-2, *SETTINGS)
    error = fail(capsys, *again)
    assert "holds an earlier run; pass --resume to go on with it, --overwrite to replace it" in error
    assert "leave one of them out" in fail(capsys, *again, "--resume", "--overwrite")
    # What the new run cannot read leaves the earlier one as it is.
    lost = ("train", trained_dir, tmp_path / "none.jsonl", "--output", output, "--overwrite", *SETTINGS)
    fail(capsys, *lost)
    assert (output / "checkpoint-2").is_dir()
    # Nor does it go for data that the loss refuses, or with folders that only look like checkpoints.
    single = tmp_path / "single.jsonl"
    single.write_text('{"prompt": "2+2=", "responses": ["4", "5", "6"], "scores": [1, 0, 0.5]}\n')
    assert "exactly 2" in fail(capsys, "train", trained_dir, single, "--output", output, "--overwrite", *SETTINGS)
    assert (output / "checkpoint-2").is_dir()
    assert (output / "model.safetensors").is_file()
    (output / "checkpoint-mine").mkdir()

    run(*again, "--overwrite")
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-mine"]
    assert (output / "notes.txt").read_text() == "mine"
    assert yaml.safe_load((output / "run.yaml").read_text())["training"]["max_steps"] == 1
    second = load_file(output / "model.safetensors")
    assert any((second[name] != first[name]).any() for name in first)
    assert "the new run reads" in fail(capsys, "train", output, pairs_file, "--output", output, "--overwrite")


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("run.yaml", "result.json", "metrics.jsonl", "model.safetensors", "config.json", "a.bad_rows.jsonl"):
        (folder / name).write_text("{}")
    (folder / "run.yaml").write_text("data: pairs.jsonl\noutput: out\ntraining: {}\n")
    for name in ("checkpoint-3", "reference_logps", "checkpoint-old", "pictures"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    (folder / "README.md").write_text("mine")
    return folder


def test_only_what_a_run_writes_is_deleted(tmp_path: Path) -> None:
    output = make_run(tmp_path / "out")
    elsewhere = make_run(tmp_path / "elsewhere")
    (output / "checkpoint-9").symlink_to(elsewhere)
    found = find_earlier_run(output)
    (output / "a.bad_rows.jsonl").write_text("of the new run")
    delete_earlier_run(found)
    left = {path.name for path in output.iterdir()}
    assert left == {"checkpoint-old", "pictures", "README.md", "a.bad_rows.jsonl"}
    assert (elsewhere / "checkpoint-3" / "file").exists()


def test_where_no_run_was_nothing_is_deleted(tmp_path: Path) -> None:
    output = make_run(tmp_path / "out")
    (output / "run.yaml").write_text("my: settings\n")
    assert find_earlier_run(output) == {}
    assert find_earlier_run(tmp_path / "new") == {}
