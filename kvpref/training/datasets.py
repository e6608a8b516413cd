"""Turns the data that users pass to the trainer into a `PreferenceDataset`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from kvpref.data import DataOptions, PreferenceDataset, load_preferences
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss
from kvpref.records.groups import Group
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.loading.selection import select_groups

_Path = str | os.PathLike[str]
PreferenceData = PreferenceDataset | Iterable[Group] | Iterable[Mapping[str, Any]] | _Path | Iterable[_Path]
"""Groups, or rows that need the tokenizer: a `datasets.Dataset`, a list of dicts, or one or more paths of files."""


def prepare_data(
    data: PreferenceData | None, name: str, loss: PreferenceLoss, args: PreferenceTrainingArguments, tokenizer: Any
) -> PreferenceDataset | None:
    """The groups with the sequences that the loss reads.

    Args:
        data: The data as given by the user.
        name: Its name in errors.
        loss: Decides which columns and sequences are kept.
        args: The training arguments; the main process reports what was read.
        tokenizer: For rows: a tokenizer, or a processor that has one.

    Raises:
        InputError: If it is neither groups nor rows, if the rows are bad, or if there is no tokenizer for them.
    """
    if data is None:
        return None
    given = _sort_out(data, name)
    if isinstance(given, PreferenceDataset):
        return select_groups(given, loss)
    if tokenizer is None:
        raise InputError(
            f"{name} holds rows, and there is no tokenizer for them; pass it as processing_class, or pass groups from "
            "kvpref.data.load_preferences"
        )
    options = DataOptions(columns=loss.columns, trajectory_pairs=loss.reads_pairs)
    groups = load_preferences(given, tokenizer, options)
    assert groups.report is not None
    if args.process_index == 0:
        for line in groups.report.lines():
            print(f"{name}: {line}", file=sys.stderr)
    return select_groups(groups, loss)


def _sort_out(data: Any, name: str) -> Any:
    """Groups as a dataset; rows and anything else unchanged, for `load_preferences` to accept or refuse."""
    if isinstance(data, PreferenceDataset | str | os.PathLike | Mapping) or hasattr(data, "column_names"):
        return data
    try:
        items = list(data)
    except TypeError:
        return data
    if all(isinstance(item, Group) for item in items):
        return PreferenceDataset(items)
    if all(isinstance(item, Mapping) for item in items) or all(isinstance(item, str | os.PathLike) for item in items):
        return items
    kinds = ", ".join(sorted({type(item).__name__ for item in items}))
    raise InputError(
        f"{name} holds {kinds}; expected groups from kvpref.data.load_preferences, or rows: a datasets.Dataset, a list "
        "of dicts or the path of a file"
    )
