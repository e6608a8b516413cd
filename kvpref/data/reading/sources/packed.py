"""Lines and bytes of files, packed or not."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from kvpref.errors import InputError

UNPACKED_HERE = (".gz", ".zst")
PACKED = (*UNPACKED_HERE, ".bz2", ".xz", ".zip")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends, without a byte order mark, one at a time.

    They are cut at line feeds alone: text iteration would also break at U+2028 and stop at the first invalid byte.

    Raises:
        InputError: With the line at which a packed file is damaged or ends too early.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
    except (EOFError, zlib.error, OSError) as error:
        if path.suffix.lower() not in UNPACKED_HERE or isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise InputError(
            f"{path}:{number + 1}: the packed file is damaged or ends too early ({error}); fetch or pack it again"
        ) from error


def read_bytes(path: Path) -> bytes:
    """All of a file; errors as of `read_lines`."""
    if path.suffix.lower() not in UNPACKED_HERE:
        return path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    return b"".join(read_lines(path))


def inner_suffix(path: Path) -> str:
    """The suffix of a file, in small letters, or of what is packed in it where it can be unpacked here."""
    packed = path.suffix.lower() in UNPACKED_HERE
    return Path(path.stem).suffix.lower() if packed else path.suffix.lower()


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")
