"""Types and ranges of settings, as far as the sources of their classes tell them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import Any

import pytest

from kvpref.cli.given_settings import Given
from kvpref.cli.setting_values import check_values, plain_type
from kvpref.errors import InputError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "abc", "x: expected a number or nothing (null); got 'abc'"),
        ("num_train_epochs", "y", "x: expected a number; got 'y'"),
        ("num_train_epochs", 0, "x: expected a number above 0; got 0"),
        ("max_grad_norm", -1, "x: expected a number of at least 0; got -1"),
        ("loss_args.beta", "much", "x: expected a number; got 'much'"),
        ("lora_r", "y", "x: expected a whole number or nothing (null); got 'y'"),
        ("disable_tqdm", 3, "x: expected true or false or nothing (null); got 3"),
    ],
)
def test_values_that_no_run_takes(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_values({name: Given(value, "x")}, loss="dpo")
    assert str(caught.value) == message


def test_what_is_not_known_yet_passes() -> None:
    check_values({"loss_args.beta": Given("much", "x")}, loss=None)
    check_values({"loss_args.beta": Given("much", "x"), "parallelism_config": Given(3, "x")}, loss="mine.py:f")
    check_values({"learning_rate": Given("5e-7", "x"), "report_to": Given(["a", "b"], "x")}, loss="dpo")
    assert plain_type("fsdp_config", None) is None


def test_without_torch() -> None:
    start = "kvpref train org/model org/data --output out "
    wrong = {
        "--bf16 --fp16": "contradict each other",
        "--set learning_rate=abc": "expected a number",
        "--tokenizer ./nowhere": "there is no such folder",
    }
    lines = ["import sys", "from kvpref.cli.app import main"]
    for options in wrong:
        lines += [f"sys.argv = {shlex.split(start + options)}", "try: main()", "except SystemExit: pass"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, "assert 'torch' not in sys.modules"])],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for said, message in zip(done.stderr.splitlines(), wrong.values(), strict=True):
        assert message in said
