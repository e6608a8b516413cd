"""Rows from tables: Parquet and Arrow files, and `datasets` on disk, on the hub or in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvpref.data.reading.columns import IMAGE_COLUMNS, ROW_FIELDS
from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.sources.column_names import ColumnNames
from kvpref.data.reading.sources.parts import Slice
from kvpref.errors import InputError

_MAX_NAMES_SHOWN = 12


class _Columns(NamedTuple):
    """The columns of a table that are decoded, and the others, by the table's names."""

    read: list[str]
    left_out: tuple[str, ...]


def read_parquet(path: Path, names: ColumnNames) -> Iterator[RawRow]:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = _known_columns(str(path), file.schema_arrow.names, names)
            batches = file.iter_batches(batch_size=_rows_per_batch(known, names), columns=known.read)
            yield from _batch_rows(batches, known, path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def count_parquet(path: Path) -> int:
    """How many rows there are."""
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def read_arrow(path: Path, names: ColumnNames) -> Iterator[RawRow]:
    """The rows of an Arrow file: in the format of files (Feather, too), or of streams, which `datasets` writes."""
    known: _Columns | None = None
    number = 0
    for batch in _arrow_batches(path):
        known = known or _known_columns(str(path), batch.schema.names, names)
        yield from _batch_rows(iter([batch.select(known.read)]), known, path, number)
        number += batch.num_rows


def count_arrow(path: Path) -> int:
    """How many rows there are."""
    return sum(batch.num_rows for batch in _arrow_batches(path))


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            with (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source) as reader:
                yield from map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Arrow file ({error}); write it again") from error


def read_dataset(
    dataset: Any, names: ColumnNames, source: str, place: str, part: Slice | None = None
) -> Iterator[RawRow]:
    """The rows of a `datasets.Dataset`, or of a slice of it.

    Args:
        dataset: In memory or mapped into it.
        names: Which columns are read.
        source: What messages call it.
        place: What stands in front of the number of a row.
        part: Which rows; None for all.

    Raises:
        InputError: If the slice holds none of them.
    """
    chosen = range(len(dataset))
    if part is not None:
        chosen = chosen[slice(*part.bounds(lambda: len(dataset)))]
    if not chosen:  # which `select` refuses behind the end
        if part is not None:
            part.refuse_empty(len(dataset), source)
        return
    if len(chosen) < len(dataset):
        dataset = dataset.select(chosen)
    if dataset.format["type"] == "custom":  # a user's transform makes the rows, of whatever columns it likes
        for number, row in zip(chosen, dataset, strict=True):
            yield RawRow(f"{place} {number + 1}", row)
        return
    known = _known_columns(source, dataset.column_names, names)
    stored = [name for name in known.read if names.final(name) in IMAGE_COLUMNS]
    # Formats give arrays and tensors in place of lists; features of images would decode them for every row.
    rows = dataset.select_columns([name for name in known.read if name not in stored]).with_format(None)
    images = dataset.select_columns(stored).with_format("arrow")
    for index, row in enumerate(rows if rows.column_names else ({} for _ in range(len(dataset)))):
        undecoded = images[index].to_pylist()[0] if stored else {}
        yield RawRow(f"{place} {chosen[index] + 1}", {**row, **undecoded}, left_out=known.left_out)


def _rows_per_batch(known: _Columns, names: ColumnNames) -> int:
    """Rows to decode at once: few where they may hold the bytes of images."""
    return 50 if any(names.final(name) in IMAGE_COLUMNS for name in known.read) else 1000


def _batch_rows(batches: Iterator[Any], known: _Columns, path: Path, number: int = 0) -> Iterator[RawRow]:
    for batch in batches:
        try:
            values = batch.to_pylist()
        except UnicodeDecodeError:
            values = None
        for index in range(batch.num_rows):
            number += 1
            location = f"{path}:row {number}"
            try:
                # Arrow does not check strings: invalid UTF-8 shows when Python objects are made, row by row here.
                value = batch.slice(index, 1).to_pylist()[0] if values is None else values[index]
                yield RawRow(location, value, left_out=known.left_out)
            except UnicodeDecodeError:
                yield RawRow(location, error="invalid UTF-8 in a string column", left_out=known.left_out)


def _known_columns(source: str, found: list[str], names: ColumnNames) -> _Columns:
    if not any(map(names.is_field, found)):
        raise InputError(
            f"{source}: no column is named {', '.join(ROW_FIELDS[:_MAX_NAMES_SHOWN])}, or as another one that is read "
            f"(see docs/data.md); found {', '.join(found) or 'none'}; rename them, as with --column prompt=NAME"
        )
    # An extra column that is missing is missing in every row, and named there.
    read = [name for name in found if names.reads(name)]
    return _Columns(read, tuple(name for name in found if name not in read))
