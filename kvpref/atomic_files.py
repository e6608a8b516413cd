"""Atomic writing of files: either complete or unchanged, with clear errors for failed writes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from kvpref.errors import InputError, RunError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, which is created; afterwards move what was written to `path`.

    If the process is killed meanwhile, or the write fails, the old file stays.

    Raises:
        RunError: If it cannot be written, for example because the disk is full.
    """
    partial = path.with_name(f"partial-{path.name}")  # the suffix stays: some writers choose the format by it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {describe(error)}; {remedy(path)}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a file in UTF-8, creating its folder; see `replacing`. `errors` is as for `str.encode`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def check_writable(path: Path) -> None:
    """Check before the work whether a file can be written; leaves nothing but its folder.

    Raises:
        InputError: If it cannot.
    """
    probe = path.with_name(f"partial-{path.name}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot write there: {describe(error)}; choose another file") from error


def describe(error: OSError) -> str:
    """Only the system's reason, if there is one."""
    return error.strerror or str(error)


def remedy(path: Path) -> str:
    """What to do about a failed write."""
    return f"what was there before is intact. Make room in {path.parent} (or let it be written to), then try again"
