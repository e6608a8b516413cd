"""Settings from files, options and assignments: read as their declared types, before a model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from command_line_in_process import fail, run

from kvpref.cli.given_settings import Given, from_file
from kvpref.cli.setting_types import read_types
from kvpref.cli.typed_values import read_value
from kvpref.errors import InputError


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("5e-7", float, 5e-7),
        ("0.5", float | None, 0.5),
        (3, float, 3),
        (4.0, int, 4),
        ("1e3", int, 1000),
        (None, int | None, None),
        ("no", str | bool, "no"),
        (False, Literal["no", "steps"], "no"),
        (2024, str | None, "2024"),
        (["a"], str | list[str] | None, ["a"]),
        ({"a": "1e-3"}, dict[str, float], {"a": 1e-3}),
        ({"a": {"b": "1e-3", "c": "x"}}, dict[str, Any], {"a": {"b": 1e-3, "c": "x"}}),
    ],
)
def test_a_value_becomes_what_its_field_declares(value: Any, kind: Any, expected: Any) -> None:
    found = read_value(value, kind, "x")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("abc", float, "a number"),
        ("nan", float, "a number"),
        (float("inf"), float | None, "a number or nothing"),
        (True, int, "a whole number"),
        (1.5, int, "a whole number"),
        ([1], int, "a whole number"),
        (None, float, "a number"),
        (1, bool, "true or false"),
        ("yes", bool, "true or false"),
        (False, str, "text"),
        ("linea", Literal["linear"], "one of linear"),
        ("a", dict[str, float], "a mapping"),
        ("a", list[str], "a list"),
    ],
)
def test_other_values_are_refused_with_what_was_expected(value: Any, kind: Any, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        read_value(value, kind, "--x")
    assert str(caught.value).startswith(f"--x: expected {expected}")
    assert str(caught.value).endswith(f"; got {value!r}")


def test_a_file_holds_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: x.jsonl\ntraining:\n  learning_rate: 5e-7\n  max_steps: 2e2\n  save_strategy: no\n"
        "  loss: ipo\n  loss_args: {beta: 1e-1}\n"
    )
    values = {name: item.value for name, item in read_types(from_file(path)).items()}
    assert values == {
        "data": "x.jsonl",
        "learning_rate": 5e-7,
        "max_steps": 200,
        "save_strategy": "no",
        "loss": "ipo",
        "loss_args.beta": 0.1,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", -1.0, "expected a number of at least 0; got -1.0"),
        ("learning_rate", [1e-3], r"expected a number or nothing (null); got [0.001]"),
        ("num_train_epochs", 0, "expected a number above 0; got 0"),
        ("max_steps", 0, "expected a number of at least 1; got 0"),
        ("per_device_train_batch_size", "8.5", "expected a whole number; got '8.5'"),
        ("max_tokens_per_micro_batch", 0, "expected a number of at least 1; got 0"),
        ("dataloader_num_workers", -2, "expected a number of at least 0; got -2"),
        ("warmup_steps", -0.1, "expected a number of at least 0; got -0.1"),
        ("lr_scheduler_type", "cosin", "expected one of linear, cosine, "),
        ("save_strategy", "never", "expected one of no, steps, epoch, best; got 'never'"),
        ("optim", "adam", "expected one of adamw_torch, "),
        ("dtype", "int8", "expected one of float32, bfloat16, float16, auto; got 'int8'"),
        ("lora_r", "many", "expected a whole number or nothing (null); got 'many'"),
        ("learning_rte", 1, "there is no setting 'learning_rte'; did you mean learning_rate?"),
        ("resume_from_checkpoint", "x", "has no effect in kvpref train; give --resume"),
        ("label_smoothing_factor", 0.1, "losses on pairs have --loss-arg label_smoothing"),
        ("loss_args.beta", "much", "expected a number; got 'much'"),
    ],
)
def test_what_a_setting_may_be_is_checked(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_types({name: Given(value, "here")})
    assert str(caught.value).startswith("here: ")
    assert message in str(caught.value)


def test_minus_one_means_whole_epochs() -> None:
    assert read_types({"max_steps": Given("-1", "x")})["max_steps"].value == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "learning_rate=abc"], "--set learning_rate: expected a number or nothing (null); got 'abc'"),
        (["--learning-rate", -1], "--learning-rate: expected a number of at least 0; got -1.0"),
        (["--batch-size", 0], "--batch-size: expected a number of at least 1; got 0"),
        (["--eval-steps", 5], "--eval-steps: there is no data to evaluate on; give --eval-data"),
        (["--set", "eval_strategy=epoch"], "--set eval_strategy: there is no data to evaluate on"),
        (["--set", "load_best_model_at_end=true"], "give evaluation data (--eval-data, eval_dataset) and how often"),
        (["--set", "neftune_noise_alpha=500"], "neftune_noise_alpha cannot be used: a shared prompt is embedded once"),
        (["--set", "use_liger_kernel=true"], "use_liger_kernel cannot be used: "),
        (["--set", "adam_beta1=1.5"], "adam_beta1 must be at least 0 and below 1; got 1.5"),
        (["--set", "adam_beta2=1.0"], "adam_beta2 must be at least 0 and below 1; got 1.0"),
        (["--set", "fsdp=full_shard"], "fsdp needs several processes: start the run with torchrun"),
        (["--set", "optim=rmsprop", "--set", "optim_args=momentum=-1"], "--set optim_args: Invalid momentum value"),
        (["--set", "parallelism_config=abc"], "parallelism_config must be an accelerate.ParallelismConfig"),
        (["--set", "report_to=wandbb"], "--set report_to: expected none, all, or some of azure_ml"),
        (["--set", "report_to=[comet_ml]"], "--set report_to: the package for 'comet_ml' is not installed"),
        (["--set", "optim=adamw_bnb_8bit"], "--set optim: "),
        (["--set", "lr_scheduler_kwargs={turns: 3}"], "--set lr_scheduler_kwargs: cosine cannot be made with it"),
        (["--set", "dataloader_persistent_workers=true"], "--set dataloader_persistent_workers: needs data workers"),
        (["--set", "dataloader_prefetch_factor=2"], "can only be set when data is loaded in a different process"),
        (["--set", "seed=1", "--set", "seed=2"], "--set seed: given twice"),
        (["--loss-arg", "beta=much"], "--loss-arg beta: expected a number; got 'much'"),
        (["--set", "loss_args=0.1"], "--set loss_args: expected a mapping of settings of the loss; got 0.1"),
        (["--max-prompt-tokens", 0], "--max-prompt-tokens: expected a number of at least 1; got 0"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(
    arguments: list[object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    # Neither the model nor the data exists: that would be the error if they were looked at first.
    error = fail(
        capsys,
        *("train", "org/model", "org/data", "--output", tmp_path / "out", "--set", "use_cpu=true"),
        *arguments,
    )
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_run_from_a_file_with_such_numbers_trains(trained_dir: Path, pairs_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({"model": str(trained_dir), "data": str(pairs_file), "output": str(tmp_path / "out")})
        + "training: {learning_rate: 5e-7, max_steps: 1e0, use_cpu: true, loss_args: {beta: 2e-1}, report_to: none}\n"
    )
    run("train", "--config", path)
    saved = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["training"]
    assert (saved["learning_rate"], saved["max_steps"], saved["loss_args"]) == (5e-7, 1, {"beta": 0.2})
