"""DATA of commands: several sources with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line_in_process import fail, run

from kvpref.cli.given_data import GivenData, parse_columns, parse_weights
from kvpref.errors import InputError

QUICK = ["--batch-size", 4, "--max-steps", 2, "--set", "use_cpu=true", "--save-steps", 1]


@pytest.fixture
def more_pairs(tmp_path: Path, pairs_file: Path) -> Path:
    path = tmp_path / "more.jsonl"
    path.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:6]))
    return path


@pytest.mark.parametrize("text", ["", "2,", "a,b", "1,0", "nan,1"])
def test_weights_are_numbers_above_0(text: str) -> None:
    with pytest.raises(InputError, match="--data-weights takes numbers above 0"):
        parse_weights(text)
    assert parse_weights("2, 1.5") == (2, 1.5)


def test_one_weight_per_source() -> None:
    with pytest.raises(InputError, match="one per DATA: got 1 for 2"):
        GivenData.of(["a", "b"], weights="1")
    assert GivenData.of(["x/a", "y/b"]).title == "a + b"


def test_train_takes_several_sources_and_goes_on_with_them(
    tmp_path: Path,
    trained_dir: Path,
    pairs_file: Path,
    more_pairs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, sources = tmp_path / "out", [pairs_file, more_pairs]
    run("train", trained_dir, *sources, "--data-weights", "1,1", "--output", output, *QUICK)
    said = capsys.readouterr().err
    assert f"{more_pairs}: 6 groups, 15 in an epoch: each 2.50 times on average" in said
    saved = yaml.safe_load((output / "run.yaml").read_text())
    assert saved["data"] == list(map(str, sources))
    assert saved["data_weights"] == [1.0, 1.0]
    assert len(json.loads((output / "resume.json").read_text())["data"]["data"]["file_hash"].split()) == 2
    run("train", "--output", output, "--resume")
    error = fail(capsys, "train", trained_dir, more_pairs, "--output", output, "--resume")
    assert "DATA is" in error
    error = fail(capsys, "train", "--output", output, "--resume", "--data-weights", "1,2")
    assert "--data-weights is [1.0, 2.0], was [1.0, 1.0]" in error
    run("train", "--config", output / "run.yaml", "--output", tmp_path / "again")


def test_a_file_of_settings_may_name_one_source(tmp_path: Path, trained_dir: Path, pairs_file: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"model": str(trained_dir), "data": str(pairs_file)}))
    run("train", "--config", settings, "--output", tmp_path / "out", *QUICK)
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["data"] == [str(pairs_file)]


def test_every_position_is_data_where_the_model_is_a_configuration(
    tmp_path: Path, config_file: Path, tokenizer_dir: Path, pairs_file: Path, more_pairs: Path
) -> None:
    start = ["--model-config", config_file, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out"]
    run("train", pairs_file, more_pairs, *start, *QUICK)
    assert len(yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["data"]) == 2


def test_columns_are_assignments() -> None:
    assert parse_columns(["prompt=question", "chosen = a=b"]) == {"prompt": "question", "chosen": "a=b"}
    for given, message in ((["prompt"], "expected NAME=COLUMN"), (["prompt=a", "prompt=b"], "given twice")):
        with pytest.raises(InputError, match=f"--column prompt: {message}"):
            parse_columns(given)


def test_a_command_line_says_all_that_was_given() -> None:
    data = GivenData.of(["a", "b"], split="[:9]", column=["prompt=q"], group_by="task", weights="2,1")
    assert data.arguments() == [
        *("a", "b", "--split", "[:9]", "--column", "prompt=q", "--group-by", "task", "--data-weights", "2,1")
    ]


def test_options_of_data_hold_for_a_command(
    tmp_path: Path, tokenizer_dir: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def inspect(*arguments: object) -> dict[str, Any]:
        run("data", "inspect", *arguments, "--tokenizer", tokenizer_dir, "--json")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(pairs_file.read_text().replace('"prompt"', '"ask"'))
    options = ["--split", "[10:15]", "--column", "prompt=ask"]
    found = inspect(renamed, renamed, *options, "--data-weights", "1,1")
    assert found["data"]["num_groups"] == 10
    assert inspect(renamed, *options)["fingerprint"] == inspect(f"{pairs_file}[10:15]")["fingerprint"]
    error = fail(capsys, "data", "inspect", renamed, "--column", "prompt=aks", "--tokenizer", tokenizer_dir)
    assert error.endswith("no row has a column 'aks'; did you mean prompt=ask?")


def test_a_resumed_run_reads_the_same_part(
    tmp_path: Path, trained_dir: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    evaluation = ["--eval-data", f"{pairs_file}:train[-4:]"]
    run("train", trained_dir, pairs_file, "--split", "[:8]", *evaluation, "--output", output, *QUICK)
    assert f"{pairs_file}:train[-4:]: 4 groups" in capsys.readouterr().err
    saved = yaml.safe_load((output / "run.yaml").read_text())
    assert (saved["split"], saved["eval_data"]) == ("[:8]", f"{pairs_file}:train[-4:]")
    run("train", "--output", output, "--resume", "--split", "[:8]")
    error = fail(capsys, "train", "--output", output, "--resume", "--split", "[:9]")
    assert "--split is '[:9]', was '[:8]'" in error
