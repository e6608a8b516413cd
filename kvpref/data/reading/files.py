"""Rows from JSON lines, JSON, Parquet, Arrow, `datasets` or memory, each with the place it came from.

A row that cannot be decoded comes back as a `RawRow` with an error, so that the caller decides whether to stop; a
source that cannot be read at all raises.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.tables import read_arrow, read_dataset, read_loaded_dataset, read_parquet
from kvpref.errors import InputError

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A path or a name, or rows in memory: a `datasets.Dataset`, or any iterable of dicts."""


def source_name(data: Source) -> str:
    """What messages call the source."""
    return os.fspath(data) if isinstance(data, str | os.PathLike) else "the rows given"


def source_folder(data: Source) -> Path:
    """Where relative paths in the rows begin: the folder of the file, or a folder itself; for the rest where we are."""
    if not isinstance(data, str | os.PathLike):
        return Path()
    path = Path(data)
    if path.is_dir():
        return path
    if path.exists():
        return path.parent
    folder = Path(os.fspath(data).rpartition(":")[0])  # of FOLDER:SPLIT
    return folder if folder.is_dir() else Path()


def read_rows(data: Source, columns: Sequence[str] = ()) -> Iterator[RawRow]:
    """Read the rows of a file or a dataset, in order.

    Args:
        data: A path ending in .jsonl, .ndjson, .json (a list of objects), .parquet, .arrow or .feather; a local dataset
            folder or hub name, optionally followed by ``:split`` (default ``train``); or rows in memory.
        columns: Extra columns to read where rows come from a table; JSON rows hold all of their fields anyway.

    Raises:
        InputError: If the source is missing, of an unknown kind, or cannot be read at all.
    """
    if not isinstance(data, str | os.PathLike):
        yield from _read_memory(data, columns)
        return
    name = os.fspath(data)
    path = Path(name)
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir() or (reader is None and not path.exists()):
        yield from read_dataset(name, columns, tuple(_READERS))
        return
    if reader is None:
        raise InputError(f"{name}: unknown file type {path.suffix!r}; rename the file to one of {', '.join(_READERS)}")
    if not path.exists():
        raise InputError(f"{name}: no such file; check the path")
    try:
        yield from reader(path, columns)
    except OSError as error:
        raise InputError(f"{name}: the file cannot be read ({error}); check the path and its permissions") from error


def _read_memory(data: Any, columns: Sequence[str]) -> Iterator[RawRow]:
    kind = type(data).__name__
    if isinstance(data, Mapping):
        splits = ", ".join(map(str, data)) or "none"
        raise InputError(f"expected rows, found a {kind} of {splits}; take one of its splits, as in data['train']")
    # Known by what they can do: importing `datasets` takes seconds.
    if hasattr(data, "select_columns") and hasattr(data, "column_names"):
        if not hasattr(data, "__len__"):
            raise InputError(f"expected rows, found an {kind}, which is of no known length; load it without streaming")
        yield from read_loaded_dataset(data, columns)
        return
    try:
        rows = iter(data)
    except TypeError:
        raise InputError(f"expected a path, a dataset or a list of rows, found {kind}") from None
    for number, row in enumerate(rows, start=1):
        yield RawRow(f"row {number}", dict(row) if isinstance(row, Mapping) else row)


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[RawRow]:
    # Lines are cut in bytes: text iteration would also break at U+2028 and stop at the first invalid byte.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            location = f"{path}:{number}"
            try:
                yield RawRow(location, json.loads(line.decode("utf-8")))
            except (ValueError, RecursionError) as error:
                yield RawRow(location, error=_decoding_error(error))


def _decoding_error(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 at byte {error.start + 1} of the line"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    return f"not valid JSON ({error})"


def _read_json(path: Path, columns: Sequence[str]) -> Iterator[RawRow]:
    content = path.read_bytes()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: invalid UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        remedy = "rename the file to .jsonl if it holds one object per line"
        if error.msg != "Extra data":
            remedy = "the file must be one JSON list of objects"
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); the file must be one JSON list of objects") from error
    if not isinstance(rows, list):
        raise InputError(
            f"{path}:1: expected a JSON list of objects, found {type(rows).__name__}; "
            "put the rows in one list, or one per line in a .jsonl file"
        )
    for number, row in enumerate(rows, start=1):
        yield RawRow(f"{path}:row {number}", row)


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
