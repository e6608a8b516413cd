"""Rows from JSON lines, JSON, Parquet or `datasets`, each with the place it came from.

A row that cannot be decoded comes back as a `RawRow` with an error, so that the caller decides whether to stop; a
source that cannot be read at all raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpref.errors import InputError

ROW_FIELDS = ("prompt", "chosen", "rejected", "responses", "scores")
"""The columns that are read, besides extra ones that are asked for by name."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One decoded row, or the reason why it could not be decoded.

    Args:
        location: ``file:line`` or ``file:row N``, counted from 1.
        value: The decoded value, of any type.
        error: Why there is no value, or None.
    """

    location: str
    value: object = None
    error: str | None = None


def read_rows(data: str, columns: Sequence[str] = ()) -> Iterator[RawRow]:
    """Read the rows of a file or a dataset, in order.

    Args:
        data: A path ending in .jsonl, .ndjson, .json (a list of objects) or .parquet; or a local dataset folder or
            hub name, optionally followed by ``:split`` (default ``train``).
        columns: Extra columns to read where rows come from a table; JSON rows hold all of their fields anyway.

    Raises:
        InputError: If the source is missing, of an unknown kind, or cannot be read at all.
    """
    path = Path(data)
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir() or (reader is None and not path.exists()):
        yield from _read_dataset(data, columns)
        return
    if reader is None:
        raise InputError(f"{data}: unknown file type {path.suffix!r}; rename the file to one of {', '.join(_READERS)}")
    if not path.exists():
        raise InputError(f"{data}: no such file; check the path")
    try:
        yield from reader(path, columns)
    except OSError as error:
        raise InputError(f"{data}: the file cannot be read ({error}); check the path and its permissions") from error


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


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = _known_columns(str(path), file.schema_arrow.names, columns)
            number = 0
            for batch in file.iter_batches(batch_size=1000, columns=known):
                for index in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(batch.slice(index, 1), f"{path}:row {number}")
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def _parquet_row(batch: Any, location: str) -> RawRow:
    # Arrow does not check strings, so invalid UTF-8 shows only when a row is turned into Python objects.
    try:
        return RawRow(location, batch.to_pylist()[0])
    except UnicodeDecodeError:
        return RawRow(location, error="invalid UTF-8 in a string column")


def _known_columns(source: str, names: list[str], extra: Sequence[str]) -> list[str]:
    if not any(name in ROW_FIELDS for name in names):
        raise InputError(
            f"{source}: no column is named {', '.join(ROW_FIELDS)}; found {', '.join(names) or 'none'}; rename them"
        )
    # An extra column that is missing is missing in every row, and named there.
    return [name for name in names if name in ROW_FIELDS or name in extra]


def _read_dataset(data: str, columns: Sequence[str]) -> Iterator[RawRow]:
    name, split = (data, "") if Path(data).is_dir() or ":" not in data else data.rsplit(":", maxsplit=1)
    dataset = _open_dataset(name, split)
    dataset = dataset.select_columns(_known_columns(data, dataset.column_names, columns))
    for number, row in enumerate(dataset, start=1):
        yield RawRow(f"{name}:{split or 'train'}:row {number}", row)


def _open_dataset(name: str, split: str) -> Any:
    import datasets

    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split or "train"]
        if (folder / "state.json").exists():
            saved = datasets.load_from_disk(name)
            if split and str(saved.split) != split:
                raise InputError(
                    f"{name}: holds one dataset of split {saved.split}, not {split!r}; leave ':{split}' out"
                )
            return saved
        return datasets.load_dataset(name, split=split or "train")
    except InputError:
        raise
    except Exception as error:  # datasets raises errors of many unrelated classes for a name it cannot serve
        raise InputError(
            f"{name}: neither a file ({', '.join(_READERS)}) nor a dataset with split {split or 'train'!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); "
            "check the path, or the name and its ':split'"
        ) from error


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
