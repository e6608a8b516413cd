"""Rows from tables: Parquet and Arrow files, and `datasets` on disk, on the hub or in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvpref.data.reading.columns import IMAGE_COLUMNS, ROW_FIELDS
from kvpref.data.reading.raw_rows import RawRow
from kvpref.errors import InputError


class _Columns(NamedTuple):
    """The columns of a table that are decoded, and the others."""

    read: list[str]
    left_out: tuple[str, ...]


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[RawRow]:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = _known_columns(str(path), file.schema_arrow.names, columns)
            batches = file.iter_batches(batch_size=_rows_per_batch(known.read), columns=known.read)
            yield from _batch_rows(batches, known, path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def read_arrow(path: Path, columns: Sequence[str]) -> Iterator[RawRow]:
    """The rows of an Arrow file: in the format of files (Feather, too), or of streams, which `datasets` writes."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            with (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source) as reader:
                known = _known_columns(str(path), reader.schema.names, columns)
                batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
                yield from _batch_rows((batch.select(known.read) for batch in batches), known, path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Arrow file ({error}); write it again") from error


def read_dataset(data: str, columns: Sequence[str], file_types: Sequence[str]) -> Iterator[RawRow]:
    """The rows of a dataset folder or hub name, optionally with ``:split``; `file_types` is for its message."""
    name, split = (data, "") if Path(data).is_dir() or ":" not in data else data.rsplit(":", maxsplit=1)
    dataset = _open_dataset(name, split, file_types)
    return _dataset_rows(dataset, columns, data, f"{name}:{split or 'train'}:row")


def read_loaded_dataset(dataset: Any, columns: Sequence[str]) -> Iterator[RawRow]:
    """The rows of a `datasets.Dataset` in memory."""
    if dataset.format["type"] == "custom":  # a user's transform makes the rows, of whatever columns it likes
        return (RawRow(f"row {number}", row) for number, row in enumerate(dataset, start=1))
    return _dataset_rows(dataset, columns, "the dataset", "row")


def _rows_per_batch(columns: Sequence[str]) -> int:
    """Rows to decode at once: few where they may hold the bytes of images."""
    return 50 if set(columns) & set(IMAGE_COLUMNS) else 1000


def _batch_rows(batches: Iterator[Any], known: _Columns, path: Path) -> Iterator[RawRow]:
    number = 0
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


def _known_columns(source: str, names: list[str], extra: Sequence[str]) -> _Columns:
    if not any(name in ROW_FIELDS for name in names):
        raise InputError(
            f"{source}: no column is named {', '.join(ROW_FIELDS)}; found {', '.join(names) or 'none'}; rename them"
        )
    # An extra column that is missing is missing in every row, and named there.
    read = [name for name in names if name in ROW_FIELDS or name in extra]
    return _Columns(read, tuple(name for name in names if name not in read))


def _dataset_rows(dataset: Any, columns: Sequence[str], source: str, place: str) -> Iterator[RawRow]:
    known = _known_columns(source, dataset.column_names, columns)
    stored = [name for name in known.read if name in IMAGE_COLUMNS]
    # Formats give arrays and tensors in place of lists; features of images would decode them for every row.
    rows = dataset.select_columns([name for name in known.read if name not in stored]).with_format(None)
    images = dataset.select_columns(stored).with_format("arrow")
    for index, row in enumerate(rows if rows.column_names else ({} for _ in range(len(dataset)))):
        undecoded = images[index].to_pylist()[0] if stored else {}
        yield RawRow(f"{place} {index + 1}", {**row, **undecoded}, left_out=known.left_out)


def _open_dataset(name: str, split: str, file_types: Sequence[str]) -> Any:
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
            f"{name}: neither a file ({', '.join(file_types)}) nor a dataset with split {split or 'train'!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); "
            "check the path, or the name and its ':split'"
        ) from error
