"""Run the command line in this process: imports are paid once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvpref.cli import app as cli_app


@contextmanager
def _arguments(*arguments: object) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["kvpref", *map(str, arguments)]
    try:
        yield
    finally:
        sys.argv = before


def run(*arguments: object) -> None:
    """`kvpref ARGUMENTS...`, which must succeed."""
    with _arguments(*arguments), pytest.raises(SystemExit) as ended:
        cli_app.main()
    assert ended.value.code == 0


def fail(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """`kvpref ARGUMENTS...`, which must fail with one error line; that line."""
    with _arguments(*arguments), pytest.raises(SystemExit) as ended:
        cli_app.main()
    assert ended.value.code == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def stopped(capsys: pytest.CaptureFixture[str], *arguments: object, code: int) -> str:
    """`kvpref ARGUMENTS...`, which a signal must stop with one line; that line."""
    with _arguments(*arguments), pytest.raises(SystemExit) as found:
        cli_app.main()
    assert found.value.code == code
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "stopped ")))
    return line
