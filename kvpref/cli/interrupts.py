"""Ctrl-C and SIGTERM during training: the step is finished and saved, and the command that resumes is printed."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from kvpref.cli.ctrl_c import NOTHING_SAVED
from kvpref.errors import Interrupted
from kvpref.ranks import num_started
from kvpref.training.saving import is_complete
from kvpref.training.stopping import StopCallback

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST_S = 2.0
"""Signals within this many seconds count as one request: torchrun repeats the terminal's Ctrl-C to its processes."""


class Interrupts:
    """The first signal ends training after the current step; a second, or one outside the training loop, stops at once.

    Args:
        output: The run's folder.
        is_main: Whether this process prints messages.

    Attributes:
        is_main: Whether this process prints messages.
        callback: The callback for the trainer.
    """

    def __init__(self, output: Path, is_main: bool) -> None:
        self._output, self.is_main = output, is_main
        self._signal: int | None = None
        self._since = 0.0
        self.callback = StopCallback(lambda: self._signal is not None)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals while open; only in the main thread, where Python delivers them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: list[tuple[signal.Signals, Any]] = [(number, signal.getsignal(number)) for number in _SIGNALS]
        for number, _ in before:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise Interrupted if training was stopped by a signal."""
        callback = self.callback
        if callback.stopped_at is None:
            return
        number = self._signal if self._signal is not None else signal.SIGINT  # another rank received the signal
        if not callback.saves:
            raise Interrupted(
                f"after step {callback.stopped_at}; save_strategy is no, so nothing of this run is kept", number
            )
        raise Interrupted(
            f"after step {callback.stopped_at}, saved as checkpoint-{callback.stopped_at}; {self._next()}", number
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None and self.callback.is_running:
            self._signal, self._since = number, now
            if (
                num_started() == 1
            ):  # with several, the process that started them reports it, and knows if one has failed
                # Not print: the signal may have interrupted one.
                os.write(2, b"\nstopping after this step; once more to stop at once\n")
            return
        if self._signal is not None and now - self._since < SAME_REQUEST_S:
            return
        if self.callback.has_begun:
            raise Interrupted(f"at once; {self._next()}", number)
        raise Interrupted(f"before training began; {self._next()}" if self._has_checkpoint() else NOTHING_SAVED, number)

    def _has_checkpoint(self) -> bool:
        return any(is_complete(path) for path in self._output.glob("checkpoint-*"))

    def _next(self) -> str:
        if not self._has_checkpoint():
            return "there is no checkpoint, so the same command starts from the beginning"
        return f"continue with: kvpref train --output {shlex.quote(str(self._output))} --resume"
