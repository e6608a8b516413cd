"""Names that cannot be meant are answered with the nearest that there is, and no hub is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line_in_process import fail

from kvpref.cli.named_sources import check_sources, refuse_to_write_over
from kvpref.errors import InputError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "model",
        "models/llama",
        "models/deep/llama",
        "run/checkpoint-9",
        "run/checkpoint-10",
        "Data",
        "empty",
    ):
        (tmp_path / name).mkdir(parents=True)
    for name in ("model", "models/llama", "models/deep/llama", "run/checkpoint-9", "run/checkpoint-10"):
        (tmp_path / name / "config.json").touch()
    for name in ("pairs.jsonl", "Data/rows.jsonl", "tiny.json"):
        (tmp_path / name).touch()
    return tmp_path


def refused(**values: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_sources(values)
    return str(caught.value)


@pytest.mark.parametrize("setting", ["model", "tokenizer", "reference", "reference_model"])
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("./modle", "model"),
        ("models/lama", "models/llama"),
        ("modls/deep/llama", "models/deep/llama"),
        ("models/dep/llama", "models/deep/llama"),
        ("./nothing-like-it", None),
        ("/nowhere/at/all", None),
    ],
)
def test_a_path_that_is_not_there(setting: str, name: str, near: str | None) -> None:
    end = "" if near is None else f"; did you mean {near}?"
    assert refused(**{setting: name}) == f"{name}: there is no such folder{end}"


def test_a_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert refused(model="~/model") == f"~/model: there is no such folder; did you mean {here / 'model'}?"


@pytest.mark.parametrize("setting", ["data", "eval_data"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./pair.jsonl:train[:10]", "./pair.jsonl: there is no such file or folder; did you mean pairs.jsonl?"),
        ("Data/row.jsonl", "Data/row.jsonl: there is no such file or folder; did you mean Data/rows.jsonl?"),
        ("pair.jsonl", "pair.jsonl: no such file; check the path; did you mean pairs.jsonl?"),
    ],
)
def test_data_that_is_not_there(setting: str, name: str, message: str) -> None:
    assert refused(**{setting: [name]}) == message


@pytest.mark.parametrize("name", ["gpt2", "org/name", "org/name-1.5", "model", "models/llama", "/", "hf://a/b/c"])
def test_names_that_may_be_meant(name: str) -> None:
    check_sources({"tokenizer": name, "reference": name, "data": [f"{name}:train", "*.csv"], "model": None})


def test_what_was_fetched_before_is_found_beside_a_folder_of_its_owner(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such folder" in refused(model="models/gone")
    (here / "cache" / "models--models--gone" / "snapshots").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    check_sources({"model": "models/gone"})


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("pairs.jsonl", "model", "MODEL and DATA seem to be swapped: pairs.jsonl holds no model, and model does"),
        ("Data", "./model", "MODEL and DATA seem to be swapped: Data holds no model, and ./model does; give the model"),
        ("tiny.json", "model", "MODEL and DATA seem to be swapped"),
        ("Data/missing.jsonl", "model", "MODEL and DATA seem to be swapped"),
        ("pairs.jsonl", "org/data", "pairs.jsonl: is a file where MODEL is expected: a folder with config.json, or a"),
        ("empty", "pairs.jsonl", "empty: the folder holds no model: there is no config.json, nor adapter_config.json"),
        ("run", "pairs.jsonl", "run: the folder holds no model; did you mean run/checkpoint-10?"),
    ],
)
def test_what_is_no_model(model: str, data: str, message: str) -> None:
    assert message in refused(model=model, data=[data])
    check_sources({"model": "tiny.json", "data": ["pairs.jsonl"]})


@pytest.mark.parametrize("command", ["train", "eval", "score", "bench", "profile time"])
def test_commands_say_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = () if command in ("eval", "bench") else ("--output", "out.jsonl")
    words = command.split()
    assert "seem to be swapped" in fail(capsys, *words, "pairs.jsonl", "model", *output)
    assert "did you mean model?" in fail(capsys, *words, "./modle", "pairs.jsonl", *output)
    assert "did you mean models/llama?" in fail(
        capsys, *words, "model", "pairs.jsonl", "--tokenizer", "models/lama", *output
    )


def test_so_do_plan_and_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean model?" in fail(capsys, "check", "./modle")
    assert "seem to be swapped" in fail(capsys, "plan", "pairs.jsonl", "--data", "model")
    assert "did you mean pairs.jsonl?" in fail(capsys, "data", "inspect", "./pair.jsonl", "--tokenizer", "gpt2")


@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("pairs.jsonl", "pairs.jsonl"),
        ("pairs.jsonl[:3]", "./pairs.jsonl"),
        ("*.jsonl", "pairs.jsonl"),
        ("Data", "Data/rows.jsonl"),
    ],
)
def test_what_a_command_reads_is_not_written_over(
    data: str, output: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / output).write_text("mine")
    assert f"is what the command reads ({data}); choose another --output" in fail(
        capsys, "score", "model", data, "--output", output
    )
    assert (here / output).read_text() == "mine"


def test_an_earlier_report_in_the_models_folder_is_replaced(here: Path) -> None:
    (here / "model" / "eval.json").touch()
    refuse_to_write_over(Path("model/eval.json"), {"model": "model", "data": ["pairs.jsonl"]})
    refuse_to_write_over(Path("Data/new.jsonl"), {"model": "model", "data": ["Data"]})
