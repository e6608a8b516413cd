"""Folders in which a run does not start, since it would overwrite what is not its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line_in_process import fail

from kvpref.cli.output_folder import check_output
from kvpref.errors import InputError


def make_run(folder: Path) -> Path:
    (folder / "checkpoint-3").mkdir(parents=True)
    (folder / "run.yaml").write_text("data: pairs.jsonl\noutput: out\ntraining: {}\n")
    for name in ("metrics.jsonl", "model.safetensors", "data.jsonl", "a.bad_rows.jsonl"):
        (folder / name).write_text("{}")
    return folder


def refused(output: Path, *sources: object, resume: bool = False, overwrite: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        check_output(output, [*map(str, sources)], resume=resume, overwrite=overwrite)
    return str(caught.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "tokenizer.json", "reference_logps", "checkpoint-5"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_not_overwritten(name: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("mine")
    found = refused(tmp_path, overwrite=overwrite)
    assert f"{tmp_path}: holds {name}, but no run.yaml of a run, so it is not a run's, and a new one would" in found
    assert "choose another --output" in refused(tmp_path, resume=True)
    (tmp_path / "run.yaml").write_text("my: settings\n")
    assert "so it is not a run's" in refused(tmp_path, overwrite=overwrite)


def test_the_command_says_so_and_changes_nothing(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("mine")
    assert "holds metrics.jsonl" in fail(capsys, "train", trained_dir, pairs_file, "--output", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_settings_that_a_run_is_given_are_not_written_over(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = f"# mine\nmodel: {trained_dir}\ndata: {pairs_file}\noutput: {tmp_path}\ntraining: {{}}\n"
    (tmp_path / "run.yaml").write_text(settings)
    error = fail(capsys, "train", "--config", tmp_path / "run.yaml")
    assert f"the new run reads {tmp_path / 'run.yaml'} and would write over it" in error
    assert (tmp_path / "run.yaml").read_text() == settings


def test_a_folder_without_files_of_a_run_is_taken(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "folder", [], resume=False, overwrite=False)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "pairs.bad_rows.jsonl").touch()  # of a start that failed before the run's settings were written
    check_output(tmp_path, ["org/model"], resume=False, overwrite=False)


def test_a_start_that_failed_later_is_taken(tmp_path: Path) -> None:
    for name in ("run.yaml", "model.safetensors"):
        (make_run(tmp_path / "out") / name).touch() if name == "run.yaml" else (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "checkpoint-3").rmdir()
    check_output(tmp_path / "out", [], resume=False, overwrite=False)


def test_an_earlier_run_is_resumed_or_replaced(tmp_path: Path) -> None:
    output = make_run(tmp_path / "out")
    message = "holds an earlier run; pass --resume to go on with it, --overwrite to replace it, or choose another"
    assert message in refused(output)
    check_output(output, [], resume=True, overwrite=False)
    check_output(output, [], resume=False, overwrite=True)


@pytest.mark.parametrize("name", ["", "checkpoint-3", "model.safetensors", "metrics.jsonl:train[:3]", "*.bad_rows.*"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_the_run_reads_is_not_overwritten(name: str, overwrite: bool, tmp_path: Path) -> None:
    output = make_run(tmp_path / "out")
    message = f"the new run reads {output / name} and would write over it; choose another --output"
    assert message in refused(output, "org/model", output / name, overwrite=overwrite)
    (tmp_path / "link").symlink_to(output)
    assert "would write over it" in refused(tmp_path / "link", output / name, overwrite=overwrite)


def test_other_files_of_the_folder_may_be_read(tmp_path: Path) -> None:
    output = make_run(tmp_path / "out")
    sources = [f"{output}/data.jsonl", str(tmp_path), str(output / "missing.jsonl"), "org/model"]
    check_output(output, sources, resume=False, overwrite=True)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    assert "model.bin: is a file; --output takes a folder" in refused(tmp_path / "model.bin")
    assert "model.bin: is a file" in refused(tmp_path / "model.bin" / "out", resume=True)
