"""Lists of values that are known before anything is imported are those of the code that reads them."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest

from kvpref.cli.choices import CHOICES, read_choice
from kvpref.cli.run_config import RunConfig
from kvpref.engine.options import PREFIX_CACHES, SCHEDULES
from kvpref.errors import InputError
from kvpref.models.checkpointing import CHECKPOINTS
from kvpref.plan.modes import MODES
from kvpref.training.arguments import REFERENCES

KNOWN: dict[str, Any] = {
    "mode": MODES,
    "schedule": SCHEDULES,
    "prefix_cache": PREFIX_CACHES,
    "checkpoint": CHECKPOINTS,
    "reference": REFERENCES,
    **{name: get_args(get_type_hints(RunConfig)[name]) for name in ("dtype", "on_bad_row", "trajectory_groups")},
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_values_are_those_that_are_read(name: str) -> None:
    assert CHOICES[name] == KNOWN[name]


@pytest.mark.parametrize(("short", "full"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_dtypes_have_short_names(short: str, full: str) -> None:
    assert read_choice("dtype", short, "--dtype") == full


def test_the_nearest_value_is_named() -> None:
    with pytest.raises(
        InputError, match=r"^--mode: expected one of two_pass, .*; got 'pakced'; did you mean packed\?$"
    ):
        read_choice("mode", "pakced", "--mode")
    assert read_choice("learning_rate", "pakced", "x") == "pakced"
    assert read_choice("mode", None, "x") is None
