"""Ten kinds of bad input: exit code 2 and one line that says where and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpref.cli import app as cli_app

GOOD = {"prompt": "one two three", "chosen": " four", "rejected": " five"}


def fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Run the command line in this process; its error line."""
    monkeypatch.setattr("sys.argv", ["kvpref", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli_app.main()
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert len(lines[0].splitlines()) == 1
    return lines[0]


BAD_ROWS = {
    "not_json": ('{"prompt": "one", ', r"data\.jsonl:2: .*JSON.*--on-bad-row skip"),
    "not_an_object": ("[1, 2]", r"data\.jsonl:2: .*object.*--on-bad-row skip"),
    "missing_field": (json.dumps({"prompt": "one", "chosen": " two"}), r"data\.jsonl:2: .*rejected.*--on-bad-row skip"),
    "wrong_type": (json.dumps({**GOOD, "chosen": 4}), r"data\.jsonl:2: .*chosen.*--on-bad-row skip"),
    "empty_response": (json.dumps({**GOOD, "rejected": ""}), r"data\.jsonl:2: .*rejected.*empty.*--on-bad-row skip"),
    "equal_responses": (
        json.dumps({**GOOD, "rejected": GOOD["chosen"]}),
        r"data\.jsonl:2: .*chosen.*rejected.*--on-bad-row skip",
    ),
}


@pytest.mark.parametrize("kind", list(BAD_ROWS))
def test_bad_rows(
    kind: str,
    tmp_path: Path,
    tokenizer_dir: Path,
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row, message = BAD_ROWS[kind]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(GOOD) + "\n" + row + "\n")
    error = fail(
        capsys,
        monkeypatch,
        *("train", "--model-config", config_file, data, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out"),
    )
    assert re.search(message, error), error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_prompt_longer_than_the_model(
    tmp_path: Path,
    tokenizer_dir: Path,
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "prompt": "one " * 140}) + "\n")
    error = fail(
        capsys,
        monkeypatch,
        *("train", "--model-config", config_file, data, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out"),
    )
    assert re.search(r"data\.jsonl:2: .*142 tokens.*128 positions.*max_prompt_tokens", error), error


def test_group_over_the_token_budget(
    tmp_path: Path,
    tokenizer_dir: Path,
    config_file: Path,
    pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = fail(
        capsys,
        monkeypatch,
        *("train", "--model-config", config_file, pairs_file, "--tokenizer", tokenizer_dir),
        *("--output", tmp_path / "out", "--max-tokens", 10, "--mode", "packed"),
    )
    assert re.search(r"pairs\.jsonl:\d+: .*10; raise max_tokens_per_micro_batch", error), error


def test_missing_data_file(
    tmp_path: Path, trained_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "nowhere.jsonl"
    error = fail(capsys, monkeypatch, "score", trained_dir, missing, "--output", tmp_path / "scores.jsonl")
    assert re.search(r"nowhere\.jsonl", error), error


def test_unsupported_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "falcon.json"
    config.write_text(json.dumps({"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 1}))
    error = fail(capsys, monkeypatch, "check", "--model-config", config)
    assert re.search(r"'falcon' is not supported: .*nearest supported family: llama", error), error


def test_model_folder_without_weights(
    tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    error = fail(capsys, monkeypatch, "train", folder, pairs_file, "--output", tmp_path / "out")
    assert re.search(r"empty: the folder holds no model: there is no config\.json", error), error


def test_tokenizer_larger_than_the_vocabulary(
    tmp_path: Path,
    config_file: Path,
    tokenizer_dir: Path,
    pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps({**json.loads(config_file.read_text()), "vocab_size": 8}))
    error = fail(
        capsys,
        monkeypatch,
        *("train", "--model-config", small, pairs_file, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out"),
    )
    assert re.search(r"12 tokens and the model 8 embeddings; .*vocab_size", error), error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [", r"run\.yaml:1: not valid YAML"),
        ("dta: pairs.jsonl", r"run\.yaml:1: dta: there is no setting 'dta'; did you mean data\?"),
        ("data: org/data", r"output is missing; give it on the command line or in --config"),
    ],
)
def test_bad_run_file(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(text)
    error = fail(capsys, monkeypatch, "train", "--config", run)
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "nope"], r"unknown loss 'nope'; choose from: dpo, robust, "),
        (["--loss-arg", "beta"], r"--loss-arg 'beta': expected NAME=VALUE"),
        (["--mode", "fast"], r"--mode: expected one of two_pass, one_pass, packed, padded; got 'fast'"),
        (["--set", "no_such=1"], r"--set no_such: there is no setting 'no_such'"),
        (["--set", "mode=fast"], r"--set mode: expected one of two_pass, .*; got 'fast'"),
        (["--mode", "packed", "--set", "mode=padded"], r"--set mode: this was given by its own option too"),
        (["--on-bad-row", "ignore"], r"--on-bad-row: expected one of stop, skip; got 'ignore'"),
    ],
)
def test_bad_settings(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    config_file: Path,
    tokenizer_dir: Path,
    pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = fail(
        capsys,
        monkeypatch,
        *("train", "--model-config", config_file, pairs_file, "--tokenizer", tokenizer_dir),
        *("--output", tmp_path / "out", *arguments),
    )
    assert re.search(message, error), error


def test_finished_run_is_not_overwritten(
    trained_dir: Path,
    config_file: Path,
    pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = (trained_dir / "model.safetensors").read_bytes()
    error = fail(capsys, monkeypatch, "train", "--model-config", config_file, pairs_file, "--output", trained_dir)
    assert re.search(r"holds an earlier run; pass --resume", error), error
    assert (trained_dir / "model.safetensors").read_bytes() == before


def test_unknown_option_is_a_usage_error() -> None:
    assert CliRunner().invoke(cli_app.app, ["train", "--no-such-option"]).exit_code == 2


def test_a_models_json_and_a_runs_yaml_are_told_apart(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    config_file: Path,
    tokenizer_dir: Path,
    pairs_file: Path,
    tmp_path: Path,
) -> None:
    error = fail(capsys, monkeypatch, "train", "--config", config_file)
    assert f"{config_file}: describes a model, not a run; give it to --model-config" in error
    settings = tmp_path / "run.yaml"
    settings.write_text("data: x.jsonl\n")
    options = ("--tokenizer", tokenizer_dir, "--output", tmp_path / "out")
    error = fail(capsys, monkeypatch, "train", "--model-config", settings, pairs_file, *options)
    assert f"--model-config {settings}: expected the JSON of a model; the YAML of a run is given to --config" in error
    error = fail(capsys, monkeypatch, "check", "--model-config", settings)
    assert "is given to --config" in error
