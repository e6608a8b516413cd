"""Datasets that `datasets` opens: saved by `save_to_disk`, from the hub, or in a layout of a hub's repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.sources.column_names import ColumnNames
from kvpref.data.reading.sources.parts import Part
from kvpref.data.reading.tables import read_dataset
from kvpref.errors import InputError


def choose_split(splits: list[str], wanted: str | None, source: str) -> str:
    """The split that is meant: the one named, the only one, or ``train``.

    Raises:
        InputError: If there is no such split, or none is named, there are several and none is ``train``.
    """
    if wanted in splits:
        assert wanted is not None
        return wanted
    if wanted is None and ("train" in splits or len(splits) == 1):
        return "train" if "train" in splits else splits[0]
    found = ", ".join(splits) or "none"
    what = "there are several splits and no train" if wanted is None else f"there is no split {wanted!r}"
    raise InputError(f"{source}: {what}; name one of {found} after a colon, as in {source}:{splits[0]}")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def read_saved(folder: str, part: Part, names: ColumnNames) -> Iterator[RawRow]:
    """The rows of a folder that `save_to_disk` wrote.

    Raises:
        InputError: If it cannot be read or has no such split.
    """
    saved = _load("load_from_disk", folder, folder)
    if isinstance(saved, dict):
        split = choose_split([*saved], part.split, folder)
        return _read_part(saved[split], part, names, f"{folder}:{split}")
    if part.split is not None and str(saved.split) not in (part.split, "None"):
        raise InputError(
            f"{folder}: holds one dataset of split {saved.split}, not {part.split!r}; leave ':{part.split}' out"
        )
    return _read_part(saved, part, names, f"{folder}:{part.split or 'train'}")


def read_named(name: str, part: Part, names: ColumnNames, file_types: str) -> Iterator[RawRow]:
    """The rows of a dataset of the hub, or of a folder laid out as one.

    Args:
        name: Of the hub, or a folder.
        part: Of it.
        names: Which columns are read.
        file_types: For messages: what files can be read.

    Raises:
        InputError: If it cannot be loaded or has no such split.
    """
    problem = f"neither files ({file_types}) nor a dataset"
    split = part.split or "train"
    try:
        dataset = _load("load_dataset", name, f"{name}: {problem} with split {split!r}", split=split)
    except InputError as error:
        if part.split is not None or "Unknown split" not in str(error):
            raise
        split = choose_split(_load("get_dataset_split_names", name, name), None, name)
        dataset = _load("load_dataset", name, name, split=split)
    return _read_part(dataset, part, names, f"{name}:{split}")


def _read_part(dataset: Any, part: Part, names: ColumnNames, place: str) -> Iterator[RawRow]:
    return read_dataset(dataset, names, place, f"{place}:row", part.slice)


def _load(function: str, name: str, message: str, **settings: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name}: reading it needs the package datasets: pip install datasets") from error
    try:
        return getattr(datasets, function)(name, **settings)
    except Exception as error:  # datasets raises errors of many unrelated classes for a name it cannot serve
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise InputError(
            f"{message} ({type(error).__name__}: {reason}); check the path, or the name and its ':split'"
        ) from error
