"""`kvpref train --resume`: the run's own settings, what may be given beside it, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from command_line_in_process import fail, run
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from kvpref.cli import resume_rules
from kvpref.cli.run_config import RunConfig
from kvpref.training import PreferenceTrainingArguments

SETTINGS = [
    *("--loss", "ipo", "--loss-arg", "beta=0.2", "--batch-size", 4, "--learning-rate", 1e-2, "--max-steps", 4),
    *("--save-steps", 2, "--set", "use_cpu=true"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, trained_dir: Path, pairs_file: Path) -> Path:
    """A run that reached its end."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run("train", trained_dir, pairs_file, "--output", output, *SETTINGS)
    return output


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> Path:
    """The same run as if it had been killed after its second step."""
    output = tmp_path / "parts"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoint-4")
    (output / "model.safetensors").unlink()
    (output / "result.json").unlink()
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in second)


def run_file(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "run.yaml").read_text())


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_resume_alone_repeats_the_runs_settings(
    whole: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("train", "--output", "parts", "--resume")
    assert same(parts, whole)
    assert run_file(parts) == run_file(whole) | {"output": str(parts)}


def test_paths_may_be_written_otherwise_and_what_does_not_count_is_taken(
    whole: Path, parts: Path, trained_dir: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pairs_file.parent)
    run(
        *("train", trained_dir, pairs_file.name, "--output", parts, "--resume", "--batch-size", 4),
        *("--logging-steps", 1, "--save-steps", 3, "--max-tokens", 60, "--loss-arg", "beta=2e-1"),
    )
    assert (parts / "checkpoint-3").exists()
    # Other micro-batches: float32 sums in another order.
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-3, atol=1e-4)
    changed = {"logging_steps": 1, "save_steps": 3, "max_tokens_per_micro_batch": 60}
    assert run_file(parts)["training"] == run_file(whole)["training"] | changed
    assert run_file(parts)["data"] == [str(pairs_file)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "dpo"], "--loss is 'dpo', was 'ipo'"),
        (["--loss-arg", "beta=0.3"], "--loss-arg beta is 0.3, was 0.2"),
        (["--batch-size", 8], "--batch-size is 8, was 4"),
        (["--learning-rate", 1e-3], "--learning-rate is 0.001, was 0.01"),
        (["--seed", 1], "--seed is 1, was 42"),
        (["--dtype", "bfloat16"], "--dtype is 'bfloat16', was 'float32'"),
        (["--max-prompt-tokens", 8], "--max-prompt-tokens is 8, was None"),
        (["--on-bad-row", "skip"], "--on-bad-row is 'skip', was 'stop'"),
        (["--lora-r", 4], "--lora-r is 4, was None"),
        (["--set", "weight_decay=0.1"], "--set weight_decay is 0.1, was 0.0"),
        (["--set", "gradient_accumulation_steps=2"], "--set gradient_accumulation_steps is 2, was 1"),
        (
            ["--max-steps", 8],
            "to train longer, first let this run finish (leave it out), then start a new run from its model: ",
        ),
        (["--epochs", 9], "--epochs is 9.0, was "),
    ],
)
def test_what_changes_results_is_refused_by_name(
    parts: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    before = contents(parts)
    error = fail(capsys, "train", "--output", parts, "--resume", *arguments)
    assert message in error
    assert f"in {parts / 'run.yaml'}" in error
    assert contents(parts) == before


def test_of_a_finished_run_a_longer_one_is_made_from_its_model(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fail(capsys, "train", "--output", whole, "--resume", "--max-steps", 8)
    assert f"to train longer, start a new run from its model: kvpref train {whole} DATA --output NEW" in error


def test_another_model_data_or_file_of_settings_is_refused(
    parts: Path,
    trained_dir: Path,
    config_file: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(pairs_file.read_text())
    error = fail(capsys, "train", trained_dir, other, "--output", parts, "--resume")
    assert f"DATA is {str(other)!r}, was {str(pairs_file)!r}" in error
    error = fail(capsys, "train", parts / "checkpoint-2", pairs_file, "--output", parts, "--resume")
    assert f"MODEL is '{parts}/checkpoint-2', was {str(trained_dir)!r}" in error
    settings = tmp_path / "settings.yaml"
    settings.write_text("training: {learning_rate: 1e-4, logging_steps: 1}")
    error = fail(capsys, "train", "--config", settings, "--output", parts, "--resume")
    assert f"{settings}:1: learning_rate is 0.0001, was 0.01" in error


def test_a_finished_run_says_so_and_changes_nothing(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(whole)
    run("train", "--output", whole, "--resume", "--logging-steps", 1, "--json")
    captured = capsys.readouterr()
    assert f"the run in {whole} has reached its end; nothing is changed" in captured.err
    assert (
        json.loads(captured.out)["train_loss"]
        == json.loads((whole / "result.json").read_text())["metrics"]["train_loss"]
    )
    assert contents(whole) == before


def test_without_a_run_file_it_says_what_to_give(
    parts: Path, trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (parts / "run.yaml").unlink()
    error = fail(capsys, "train", trained_dir, pairs_file, "--output", parts, "--resume", *SETTINGS)
    assert "holds checkpoint-2 but no run.yaml" in error
    assert f"write its settings to {parts / 'run.yaml'} in the form of --config" in error
    error = fail(capsys, "train", "--output", tmp_path / "none", "--resume")
    assert "there is no run to resume; give MODEL and DATA" in error
    assert not (tmp_path / "none").exists()


def test_where_there_is_nothing_yet_it_starts(
    whole: Path, trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", trained_dir, pairs_file, "--output", tmp_path / "new", "--resume", *SETTINGS)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "starting from the beginning" in line)
    assert "holds no run yet" in line
    assert same(tmp_path / "new", whole)


def test_a_run_at_a_constant_learning_rate_may_be_made_longer(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = [*SETTINGS, "--set", "lr_scheduler_type=constant"]
    longer = [6 if index and constant[index - 1] == "--max-steps" else item for index, item in enumerate(constant)]
    run("train", trained_dir, pairs_file, "--output", tmp_path / "long", *longer)
    run("train", trained_dir, pairs_file, "--output", tmp_path / "short", *constant)
    run("train", "--output", tmp_path / "short", "--resume", "--max-steps", 6)
    assert same(tmp_path / "short", tmp_path / "long")
    error = fail(capsys, "train", "--output", tmp_path / "short", "--resume", "--max-steps", 5)
    assert "--max-steps is 5, was 6" in error


def test_losses_that_couple_a_micro_batch_keep_its_budget() -> None:
    assert "max_tokens_per_micro_batch" in resume_rules.may_differ({"loss": "dpo"})
    for values in ({"loss": "kto"}, {"loss": "mixture", "loss_args.weights": {"dpo": 1.0, "aot": 1.0}}):
        assert not {"max_tokens_per_micro_batch", "mode"} & resume_rules.may_differ(values)
    assert "eval_steps" not in resume_rules.may_differ({"loss": "dpo", "load_best_model_at_end": True})


def test_every_name_of_the_rules_is_a_setting() -> None:
    known = {item.name for kind in (PreferenceTrainingArguments, RunConfig) for item in fields(kind)}
    named = [resume_rules.LOGGING, resume_rules.SAVING, resume_rules.CADENCE, resume_rules.BUDGET, resume_rules.CUT]
    assert frozenset().union(*named, resume_rules.MACHINE, resume_rules.LENGTH) <= known


def test_another_number_of_processes_keeps_the_groups_of_a_step(
    whole: Path, parts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if two processes of two groups each had run it.
    record = json.loads((parts / "resume.json").read_text())
    (parts / "resume.json").write_text(json.dumps(record | {"world_size": 2}))
    settings = run_file(parts)
    settings["training"]["per_device_train_batch_size"] = 2
    (parts / "run.yaml").write_text(yaml.safe_dump(settings))
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        error = fail(capsys, "train", "--output", parts, "--resume")
    assert "made by 2 processes, each with 2 groups per step, and cannot go on with 3" in error
    run("train", "--output", parts, "--resume")
    assert "1 in place of 2 processes: 4 groups each keep the steps of 4" in capsys.readouterr().err
    assert same(parts, whole)
    assert json.loads((parts / "resume.json").read_text())["world_size"] == 1


def test_edited_data_is_refused_with_the_row(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "pairs.jsonl", tmp_path / "out"
    lines = pairs_file.read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    # A loss without reference, of which no log-probs are stored.
    run("train", trained_dir, data, "--output", output, "--loss", "sft", "--max-steps", 2, "--set", "use_cpu=true")
    (output / "result.json").unlink()
    edited = json.loads(lines[2]) | {"chosen": " nine nine"}
    data.write_text("".join([*lines[:2], json.dumps(edited) + "\n", *lines[3:]]))
    error = fail(capsys, "train", "--output", output, "--resume")
    assert f"24 groups; the first of 1 groups with other tokens, images, labels, scores or columns is {data}:3" in error
    assert "the file was edited since; put it back as it was" in error
    data.write_text("".join([*lines, lines[0]]))
    error = fail(capsys, "train", "--output", output, "--resume")
    assert f"25 groups in place of 24; the first new one is {data}:25" in error
    data.write_text("".join(lines[:20]))
    error = fail(capsys, "train", "--output", output, "--resume")
    assert f"20 groups in place of 24; the last one left is {data}:20" in error


def test_a_template_that_writes_the_date_is_named_as_the_cause(
    trained_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained_dir)
    tokenizer.chat_template = (
        "{{ 'one ' if strftime_now('%d') == '03' else 'two ' }}"
        "{% for message in messages %}{{ message.content }} {% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data, output = tmp_path / "chats.jsonl", tmp_path / "out"
    user = [{"role": "user", "content": "one two three"}]
    answers = [[{"role": "assistant", "content": word}] for word in ("four", "five")]
    row = json.dumps({"prompt": user, "chosen": answers[0], "rejected": answers[1]})
    data.write_text(f"{row}\n{row}\n")
    set_day(monkeypatch, "03")
    run(
        *("train", trained_dir, data, "--tokenizer", tmp_path / "tokenizer", "--output", output, "--loss", "dpo"),
        *("--max-steps", 2, "--set", "use_cpu=true"),
    )
    (output / "result.json").unlink()
    set_day(monkeypatch, "04")
    error = fail(capsys, "train", "--output", output, "--resume")
    assert f"the first of 2 groups with other tokens, images, labels, scores or columns is {data}:1" in error
    day = json.loads((output / "resume.json").read_text())["day"]
    assert "the file is unchanged, but the chat template writes the date (strftime_now)" in error
    assert f"write the date of the run's start ({day}) in its place" in error
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text().replace("strftime_now('%d')", "'04'"))
    assert "chat template is another one; put it back" in fail(capsys, "train", "--output", output, "--resume")
    # The remedy works: the run's day in place of the function.
    template.write_text(template.read_text().replace("'04'", "'03'"))
    run("train", "--output", output, "--resume")


def set_day(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Let chat templates see a day of the month."""
    now = SimpleNamespace(strftime=lambda form: day if form == "%d" else form)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: now))
