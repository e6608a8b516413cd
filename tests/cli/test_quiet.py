"""What libraries print of their own."""

from __future__ import annotations

import os
import sys
import warnings

import pytest

from kvpref.cli.quiet import hide_library_noise, hide_profiler_noise

BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (BARS, "HF_DATASETS_DISABLE_PROGRESS_BARS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "set so that it is taken back")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("is_terminal", "expected"), [(False, "1"), (True, None)])
def test_bars_are_for_terminals(is_terminal: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with warnings.catch_warnings():
        hide_library_noise()
    assert os.environ.get(BARS) == expected


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    monkeypatch.setenv(BARS, "0")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    with warnings.catch_warnings():
        hide_library_noise()
        hide_profiler_noise()
    assert (os.environ[BARS], os.environ["TORCH_CPP_LOG_LEVEL"]) == ("0", "INFO")


def test_only_warnings_between_libraries_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        hide_library_noise()
        warnings.warn(
            "`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1
        )
        warnings.warn("your option is deprecated", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in heard] == ["your option is deprecated"]
