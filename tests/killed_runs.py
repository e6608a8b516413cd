"""`kvpref train` in forks of one process, some of them killed; see tests/cli/test_kills.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import kvpref.cli.training_run  # noqa: F401 - before the first fork, so that no fork pays for it
from kvpref.cli import app

torch.set_num_threads(1)
os.environ["TQDM_DISABLE"] = "1"


def start(*arguments: str) -> int:
    """Fork a process that runs ``kvpref ARGUMENTS...``; its id."""
    pid = os.fork()
    if pid:
        return pid
    sys.argv = ["kvpref", *arguments]
    sys.stdout = sys.stderr
    code = 1
    try:
        app.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(pid: int) -> None:
    """Wait for a run, which must succeed."""
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"a run ended with {os.waitstatus_to_exitcode(status)}")


def main(job: dict) -> None:
    arguments, parts = job["arguments"], Path(job["parts"])
    began = time.monotonic()
    finish(start(*arguments, "--output", job["whole"]))
    step_s = (time.monotonic() - began) / job["num_steps"]
    for index, fraction in enumerate(job["fractions"]):
        before = newest(parts)
        pid = start(*arguments, "--output", str(parts), "--resume")
        if index % 5 < 4:  # the others are killed on their way to the first step
            while newest(parts) <= before and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
        time.sleep(2 * step_s * fraction)
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != -signal.SIGKILL:
            sys.exit(f"run {index} ended with {code} before it was killed")
    finish(start(*arguments, "--output", str(parts), "--resume"))


def newest(output: Path) -> int:
    """The last step whose checkpoint was begun."""
    return max((int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*")), default=0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
