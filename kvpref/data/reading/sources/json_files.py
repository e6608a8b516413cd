"""Rows of JSON: one object per line, or one list of objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvpref.data.reading.json_text import RepeatedKeyError, decode_json, decode_json_and_mark, find_repeated_key
from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.sources.column_names import ColumnNames
from kvpref.data.reading.sources.packed import read_bytes, read_lines
from kvpref.errors import InputError


def read_jsonl(path: Path, names: ColumnNames) -> Iterator[RawRow]:
    """One row per line that is not blank."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        location = f"{path}:{number}"
        try:
            yield RawRow(location, decode_json(line.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            yield RawRow(location, error=_decoding_error(error))


def count_jsonl(path: Path) -> int:
    """How many rows there are."""
    return sum(bool(line.strip()) for line in read_lines(path))


def _decoding_error(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 at byte {error.start + 1} of the line"
    if isinstance(error, RepeatedKeyError):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    return f"not valid JSON ({error})"


def read_json(path: Path, names: ColumnNames) -> Iterator[RawRow]:
    """One row per item of the list, which is read as a whole."""
    try:
        rows, repeated = _read_list(path, decode_json), False
    except RepeatedKeyError:
        rows, repeated = _read_list(path, decode_json_and_mark), True
    for number, row in enumerate(rows, start=1):
        error = find_repeated_key(row) if repeated else None
        location = f"{path}:row {number}"
        yield RawRow(location, row) if error is None else RawRow(location, error=str(error))


def count_json(path: Path) -> int:
    """How many rows there are."""
    return len(_read_list(path, json.loads))


def _read_list(path: Path, decode: Callable[[str], Any]) -> list[object]:
    content = read_bytes(path)
    try:
        rows = decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: invalid UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        remedy = "rename the file to .jsonl if it holds one object per line"
        if error.msg != "Extra data":
            remedy = "the file must be one JSON list of objects"
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); {remedy}") from error
    except RepeatedKeyError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); the file must be one JSON list of objects") from error
    if not isinstance(rows, list):
        raise InputError(
            f"{path}:1: expected a JSON list of objects, found {type(rows).__name__}; "
            "put the rows in one list, or one per line in a .jsonl file"
        )
    return rows
