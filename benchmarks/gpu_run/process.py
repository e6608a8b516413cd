"""A worker process, seen from the driver; standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from places import HERE, ROOT

WORKER = HERE / "gpu_run" / "worker.py"
Event = dict[str, Any]
END_S = 5.0
"""What a process may take to end."""


class WorkerProcess:
    """A worker: imports what stages need, then waits for a job; `next_event` returns what it reports.

    Args:
        log: Gets what it prints.
        script: What runs in it.
    """

    def __init__(self, log: Path, script: Path = WORKER) -> None:
        self.log, self._log_start = log, log.stat().st_size if log.exists() else 0
        # The machine may have no installed kvpref, only this checkout.
        paths = [str(HERE), str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, str(script)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                start_new_session=True,  # so that what it starts ends with it
            )
        self._events: queue.Queue[Event | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, job: dict[str, Any]) -> None:
        """Send a job; if the process has died, `next_event` notices."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def next_event(self, timeout_s: float) -> Event | None:
        """The next event; None once the process has ended.

        Raises:
            TimeoutError: If no event arrives in time.
        """
        try:
            return self._events.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            raise TimeoutError from None

    def stop(self) -> None:
        """Kill the process, and all that it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._wait()

    def why_it_ended(self) -> str:
        """Exit code and the last line printed."""
        code = self._wait()
        if code is None:
            return "its process closed its output and does not end"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        with self.log.open("rb") as stream:
            stream.seek(self._log_start)
            lines = stream.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with {how}" + (f": {lines[-1][:200]}" if lines else "")

    def _wait(self) -> int | None:
        """Exit code; None if a driver holds the process in the kernel, which nothing else should wait for."""
        try:
            return self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            return None

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # of half a line, which is all that a killed process may leave
            for line in self._process.stdout:
                self._events.put(json.loads(line))
        self._events.put(None)
