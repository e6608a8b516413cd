"""`kvpref train --num-processes` in forks of a process that has imported everything: a start takes milliseconds.

Run as a script with jobs as JSON, a list of lists of arguments and a folder; see `run_forked`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from command_line import environment

TIMEOUT_SECONDS = 1200
"""Against hanging only."""


@dataclass
class Ended:
    """One command."""

    code: int
    stderr: str


def run_forked(folder: Path, *jobs: Sequence[object]) -> list[Ended]:
    """Run ``kvpref ARGUMENTS...`` for each of `jobs`, one after another."""
    texts = [[str(argument) for argument in job] for job in jobs]
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(texts), str(folder)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads((folder / "codes.json").read_text())
    return [Ended(code, (folder / f"{number}.log").read_text()) for number, code in enumerate(codes)]


class ForkedProcess:
    """What `kvpref.cli.starting_ranks` needs of `subprocess.Popen`."""

    returncode: int | None = None

    def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
        def be_a_rank() -> None:
            os.setpgid(0, 0)
            os.environ.clear()
            os.environ.update(env)
            run_command(command[3:])

        self.pid = fork(be_a_rank)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> None:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(action: Callable[[], object]) -> int:
    """The id of a process that does `action`."""
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        action()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_command(arguments: list[str]) -> NoReturn:
    from kvpref.cli import app

    sys.argv = ["kvpref", *arguments]
    app.main()
    sys.exit(0)


def main(jobs: list[list[str]], folder: Path) -> None:
    import torch

    import kvpref.cli.training_run  # noqa: F401 - before the first fork, so that no fork pays for it
    from kvpref.cli import starting_ranks

    torch.set_num_threads(1)
    gc.freeze()  # as in tests/conftest.py
    starting_ranks.subprocess.Popen = ForkedProcess  # type: ignore[misc,assignment]
    codes = []
    for number, arguments in enumerate(jobs):
        with (folder / f"{number}.log").open("w") as log:

            def start(log: Any = log, arguments: list[str] = arguments) -> None:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                run_command(arguments)

            codes.append(os.waitstatus_to_exitcode(os.waitpid(fork(start), 0)[1]))
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
