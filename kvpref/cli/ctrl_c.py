"""Ends a command on Ctrl-C with one line. Light, so that it is in place before slow imports."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from kvpref.errors import Interrupted

NOTHING_SAVED = "before training began; nothing was saved"


@contextlib.contextmanager
def ctrl_c_says(message: str) -> Iterator[None]:
    """While open, Ctrl-C raises Interrupted; typer would end silently on a KeyboardInterrupt.

    Args:
        message: The text after "stopped".
    """
    before = signal.getsignal(signal.SIGINT)
    # Python delivers signals only in the main thread; a background command may ignore this one.
    if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(message, number)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove a new folder if the work inside fails before anything was written to it."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        raise
