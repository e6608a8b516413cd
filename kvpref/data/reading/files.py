"""Rows from JSON lines, JSON, CSV, Parquet, Arrow, `datasets` or memory, each with the place it came from.

A row that cannot be decoded comes back as a `RawRow` with an error, so that the caller decides whether to stop; a
source that cannot be read at all raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.sources.column_names import ColumnNames
from kvpref.data.reading.sources.csv_files import count_csv, read_csv
from kvpref.data.reading.sources.hub import choose_split, is_saved, read_named, read_saved
from kvpref.data.reading.sources.json_files import count_json, count_jsonl, read_json, read_jsonl
from kvpref.data.reading.sources.packed import inner_suffix
from kvpref.data.reading.sources.parts import Part, Slice, is_pattern, parse_part, parse_source
from kvpref.data.reading.sources.shards import find_splits, match_files, one_kind, pattern_folder, refuse_kind
from kvpref.data.reading.tables import count_arrow, count_parquet, read_arrow, read_dataset, read_parquet
from kvpref.errors import InputError

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A path or a name, or rows in memory: a `datasets.Dataset`, or any iterable of dicts."""

Sources = Source | Sequence[str | os.PathLike[str]]
"""One source, or a list of paths and names."""


class _Form(NamedTuple):
    """How files of one kind are read."""

    kind: str
    read: Callable[[Path, ColumnNames], Iterator[RawRow]]
    count: Callable[[Path], int]


_JSON_LINES, _ARROW = _Form("JSON lines", read_jsonl, count_jsonl), _Form("Arrow", read_arrow, count_arrow)
_FORMS = {
    ".jsonl": _JSON_LINES,
    ".ndjson": _JSON_LINES,
    ".json": _Form("JSON", read_json, count_json),
    ".csv": _Form("CSV", read_csv, count_csv),
    ".tsv": _Form("TSV", read_csv, count_csv),
    ".parquet": _Form("Parquet", read_parquet, count_parquet),
    ".arrow": _ARROW,
    ".feather": _ARROW,
}
_PACKABLE = ("JSON lines", "JSON", "CSV", "TSV")
_MAX_CARD_LINES = 5000
_KINDS = {suffix: form.kind for suffix, form in _FORMS.items()}


def list_sources(data: Sources) -> list[Source]:
    """The sources one by one; a list of rows is one.

    Raises:
        InputError: If a list holds both paths and rows.
    """
    if not isinstance(data, list | tuple) or not any(isinstance(item, str | os.PathLike) for item in data):
        return [data]  # type: ignore[list-item]  # of paths there are none
    for item in data:
        if not isinstance(item, str | os.PathLike):
            raise InputError(f"expected a list of paths and names, or one of rows; it holds {type(item).__name__} too")
    return list(data)


def source_name(data: Source) -> str:
    """What messages call the source."""
    return os.fspath(data) if isinstance(data, str | os.PathLike) else "the rows given"


def source_folder(data: Source) -> Path:
    """Where relative paths in the rows begin: the folder of the file, or a folder itself; for the rest where we are."""
    if not isinstance(data, str | os.PathLike):
        return Path()
    name, _ = parse_source(os.fspath(data))
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        return path.parent
    return pattern_folder(name) if is_pattern(name) else Path()


def source_files(data: Source, split: str | None = None) -> list[Path]:
    """The files of the source that kvpref reads itself, in order; none for datasets of other kinds.

    Raises:
        InputError: As `read_rows`.
    """
    if not isinstance(data, str | os.PathLike):
        return []
    return _find_files(*parse_source(os.fspath(data), split))[0]


def read_rows(data: Source, names: ColumnNames | None = None, split: str | None = None) -> Iterator[RawRow]:
    """Read the rows of a source, in order, with kvpref's names of their columns.

    Args:
        data: A path ending in one of the suffixes in `_FORMS`; a folder of such files, or a pattern; a dataset folder
            or hub name; each optionally followed by ``:split`` and a slice; or rows in memory.
        names: Which columns are read where rows come from a table, and under which names.
        split: As what may follow a path, in its place.

    Raises:
        InputError: If the source is missing, of an unknown kind, or cannot be read at all.
    """
    names = names or ColumnNames()
    if isinstance(data, str | os.PathLike):
        name, part = parse_source(os.fspath(data), split)
        rows = _read_named(name, part, names)
    else:
        rows = _read_memory(data, Part() if split is None else parse_part(split), names)
    return map(names.rename, rows)


def _read_named(name: str, part: Part, names: ColumnNames) -> Iterator[RawRow]:
    files, rows = _find_files(name, part)
    if files:
        form = _FORMS[one_kind(files, _KINDS, name)]
        yield from _take(_read_files(files, form, names), rows, lambda: sum(map(form.count, files)), name)
    elif Path(name).is_dir() and is_saved(Path(name)):
        yield from read_saved(name, part, names)
    else:
        yield from read_named(name, part, names, ", ".join(_FORMS))


def _find_files(name: str, part: Part) -> tuple[list[Path], Slice | None]:
    """The files and the rows of all of them that are meant; no files where `datasets` is to read."""
    path = Path(name)
    if is_pattern(name):
        return match_files(name), part.only_train(name, "what matches a pattern")
    if path.is_dir():
        if is_saved(path) or _is_described(path):
            return [], None
        splits = find_splits(path, _KINDS)
        return (splits[choose_split([*splits], part.split, name)] if splits else []), part.slice
    form = _FORMS.get(inner_suffix(path))
    if not path.exists():
        if form is None:
            return [], None
        raise InputError(f"{name}: no such file; check the path")
    if form is None or (inner_suffix(path) != path.suffix.lower() and form.kind not in _PACKABLE):
        refuse_kind(path, _KINDS)
    return [path], part.only_train(name, "a file")


def _is_described(folder: Path) -> bool:
    """Whether other files say what the data files hold, which `datasets` reads: a card with splits, lists of images."""
    if any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*")):
        return True
    card = folder / "README.md"
    if not card.is_file():
        return False
    with card.open(encoding="utf-8", errors="replace") as file:
        first, *lines = [line.rstrip() for line in islice(file, _MAX_CARD_LINES)] or [""]
    return first == "---" and "configs:" in takewhile(lambda line: line != "---", lines)


def _read_files(files: list[Path], form: _Form, names: ColumnNames) -> Iterator[RawRow]:
    for path in files:
        try:
            yield from form.read(path, names)
        except OSError as error:
            raise InputError(
                f"{path}: the file cannot be read ({error}); check the path and its permissions"
            ) from error


def _take(rows: Iterator[RawRow], chosen: Slice | None, count: Callable[[], int], source: str) -> Iterator[RawRow]:
    """Those of a slice; nothing behind it is read."""
    if chosen is None:
        yield from rows
        return
    rows = islice(rows, *chosen.bounds(count))
    first = next(rows, None)
    if first is None:
        chosen.refuse_empty(count(), source)
        return
    yield first
    yield from rows


def _read_memory(data: Any, part: Part, names: ColumnNames) -> Iterator[RawRow]:
    kind = type(data).__name__
    if isinstance(data, Mapping):
        splits = ", ".join(map(str, data)) or "none"
        if part.split not in data:
            raise InputError(f"expected rows, found a {kind} of {splits}; take one of its splits, as in data['train']")
        data = data[part.split]
        kind, part = type(data).__name__, Part(None, part.slice)
    chosen = part.only_train("the rows given", "what is in memory")
    # Known by what they can do: importing `datasets` takes seconds.
    if hasattr(data, "select_columns") and hasattr(data, "column_names"):
        if not hasattr(data, "__len__"):
            raise InputError(f"expected rows, found an {kind}, which is of no known length; load it without streaming")
        return read_dataset(data, names, "the dataset", "row", chosen)
    try:
        rows = iter(data)
    except TypeError:
        raise InputError(f"expected a path, a dataset or a list of rows, found {kind}") from None
    raw = (
        RawRow(f"row {number}", dict(row) if isinstance(row, Mapping) else row)
        for number, row in enumerate(rows, start=1)
    )
    return _take(raw, chosen, lambda: _count_memory(data), source_name(data))


def _count_memory(data: Any) -> int:
    if not hasattr(data, "__len__"):
        raise InputError(
            "a slice in percent, from the end or of no rows needs rows of known length; give a list of them"
        )
    return len(data)
