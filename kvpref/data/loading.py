"""`load_preferences`: sources to one dataset of tokenized groups, with a report of what was left out or cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpref.data.dataset import DataOptions, PreferenceDataset
from kvpref.data.group_loader import GroupLoader
from kvpref.data.mixing import merge_reports, mix
from kvpref.data.reading.files import Source, Sources, list_sources, read_rows
from kvpref.data.reading.sources.column_names import ColumnNames
from kvpref.data.report import DataReport
from kvpref.data.storage import PackedGroups
from kvpref.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


def load_preferences(
    data: Sources, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, options: DataOptions | None = None
) -> PreferenceDataset:
    """Read, check and tokenize preference data.

    Args:
        data: A file (.jsonl, .json, .csv, .parquet, ...; docs/data.md has them all), a pattern, a folder of files or of
            `save_to_disk`, or a hub name, each optionally with ``:split`` and a slice; or rows in memory: a
            `datasets.Dataset`, or any iterable of dicts; or a list of any number of files and names.
        tokenizer: A Hugging Face tokenizer, or the processor of a model that sees images. Rows of messages need its
            chat template.
        options: Limits, and what to do with bad rows; `DataOptions()` if None.

    Returns:
        One group per good row, with the row's location as its id. A pair gives ``labels=(True, False)``. Trajectories
        and rows of model calls give one group per task, named by the location of its (first) row and by its id.

    Raises:
        InputError: If the source cannot be read, is empty or holds only bad rows; at the first bad row unless they
            are to be skipped; if rows hold messages and the tokenizer has no chat template; if no row has a column that
            is to be read under another name; if there is not one weight per source.
    """
    options, sources = options or DataOptions(), list_sources(data)
    weights = options.data_weights
    if weights is not None and len(weights) != len(sources):
        raise InputError(f"data_weights must be one per source: got {len(weights)} for {len(sources)}")
    read = options.columns if options.group_by is None else (*options.columns, options.group_by)
    groups, names = PackedGroups(), ColumnNames(options.column_names, read)
    try:
        reports = [_load(source, tokenizer, options, names, groups) for source in sources]
    except InputError as error:
        if (missing := names.missing()) is None:
            raise
        raise InputError(f"{error}; {missing}") from error
    if (missing := names.missing()) is not None:
        raise InputError(missing)
    if len(reports) == 1:
        return PreferenceDataset(groups, reports[0])
    if weights is None:
        return PreferenceDataset(groups, merge_reports(reports, None, ()))
    order = mix([report.num_groups for report in reports], weights, options.seed)
    return PreferenceDataset((groups[index] for index in order), merge_reports(reports, weights, order))


def _load(source: Source, tokenizer: Any, options: DataOptions, names: ColumnNames, groups: PackedGroups) -> DataReport:
    """Add the groups of one source."""
    loader = GroupLoader(source, tokenizer, options, groups)
    for row in read_rows(source, names, options.split):
        loader.add(row)
    return loader.finish()
