"""Ctrl-C ends a command with one line. Light: in place before anything slow is imported."""

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
    """While open, Ctrl-C raises Interrupted: a KeyboardInterrupt would end in typer, which says nothing.

    Args:
        message: To follow "stopped".
    """
    before = signal.getsignal(signal.SIGINT)
    # Python delivers signals in the main thread only; a command in the background may ignore this one.
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
    """A folder that is new does not stay, if the work in here fails before anything was written to it."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
        raise
