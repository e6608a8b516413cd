"""Settings of precision that contradict one another are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line_in_process import fail

from kvpref.cli.given_settings import Given
from kvpref.cli.precision import check_precision

REFUSED = [
    (["--bf16", "--dtype", "fp16"], "--bf16 and --dtype float16 contradict each other: bf16 is autocast over float32"),
    (["--fp16", "--dtype", "bfloat16"], "--set fp16 and --dtype bfloat16 contradict each other"),
    (["--fp16", "--dtype", "float16"], "--set fp16 and --dtype float16 contradict each other"),
    (["--bf16", "--fp16"], "--bf16 and --set fp16 contradict each other: there is one autocast; leave one of them out"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_train(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fail(capsys, "train", "org/model", "org/data", "--output", tmp_path / "out", *options)


@pytest.mark.parametrize("command", ["eval", "bench", "plan"])
def test_other_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", "org/data") if command == "plan" else ("org/data",)
    assert REFUSED[0][1] in fail(capsys, command, "org/model", *data, "--bf16", "--dtype", "float16")


@pytest.mark.parametrize(
    "values",
    [
        {"bf16": True, "dtype": "float32"},
        {"bf16": True, "dtype": "bfloat16"},
        {"bf16": False, "fp16": True, "dtype": "auto"},
        {"bf16": None, "fp16": None, "dtype": "float16"},
        {"bf16": True},
    ],
)
def test_what_goes_together(values: dict[str, object]) -> None:
    check_precision({name: Given(value, name) for name, value in values.items()})
