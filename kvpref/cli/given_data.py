"""DATA on the command line: the sources, the part of them to read, and the names of their columns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpref.errors import InputError

if TYPE_CHECKING:
    from kvpref.data import DataOptions, PreferenceDataset


@dataclass(frozen=True, kw_only=True)
class GivenData:
    """The data of a command, with the options that say how it is read."""

    sources: tuple[str, ...]
    """Files, folders, patterns or hub names."""

    split: str | None = None
    """The split to read of each source."""

    column_names: Mapping[str, str] = field(default_factory=dict)
    """From kvpref's name of a column to the data's."""

    group_by: str | None = None
    """The column whose equal values make one group of rows with one response each."""

    weights: tuple[float, ...] | None = None
    """One per source; None reads each source once."""

    @classmethod
    def of(
        cls,
        sources: str | Sequence[str],
        *,
        split: str | None = None,
        column: Sequence[str] | None = None,
        group_by: str | None = None,
        weights: str | None = None,
    ) -> GivenData:
        """The data that the options describe.

        Raises:
            InputError: If an option has another form.
        """
        sources = [sources] if isinstance(sources, str) else sources  # commands may be called as functions
        parsed = None if weights is None else parse_weights(weights)
        if parsed is not None and len(parsed) != len(sources):
            raise InputError(f"--data-weights takes one per DATA: got {len(parsed)} for {len(sources)}")
        return cls(
            sources=tuple(sources),
            split=split,
            column_names=parse_columns(column or ()),
            group_by=group_by,
            weights=parsed,
        )

    @property
    def title(self) -> str:
        """Its short name, for titles."""
        return " + ".join(Path(source).name for source in self.sources)

    @property
    def setting(self) -> str | list[str]:
        """What reports record: the source, or all that was given."""
        given = self.arguments()
        return given[0] if len(given) == 1 else given

    @property
    def stem(self) -> str:
        """A name for files made from it."""
        return re.sub(r"[^\w.-]+", "_", Path(self.sources[0]).stem).strip("_") or "data"

    def files(self) -> list[Path] | None:
        """The files that it is read from; None if `datasets` reads it."""
        from kvpref.data.reading.files import source_files

        files = [source_files(source, self.split) for source in self.sources]
        return [path for found in files for path in found] if all(files) else None

    def __str__(self) -> str:
        return " + ".join(self.sources)

    def arguments(self) -> list[str]:
        """The arguments that name it on a command line."""
        named = [] if self.split is None else ["--split", self.split]
        for name, original in self.column_names.items():
            named += ["--column", f"{name}={original}"]
        named += [] if self.group_by is None else ["--group-by", self.group_by]
        weights = [] if self.weights is None else ["--data-weights", ",".join(f"{weight:g}" for weight in self.weights)]
        return [*self.sources, *named, *weights]

    def options(self, options: DataOptions) -> DataOptions:
        """`options` with those that were given with the data."""
        return replace(
            options, split=self.split, column_names=self.column_names, group_by=self.group_by, data_weights=self.weights
        )

    def load(self, tokenizer: Any, options: DataOptions | None = None) -> PreferenceDataset:
        """Its groups; see `kvpref.data.load_preferences`."""
        from kvpref.data import DataOptions, load_preferences

        return load_preferences(list(self.sources), tokenizer, self.options(options or DataOptions()))


def parse_columns(assignments: Sequence[str]) -> dict[str, str]:
    """Turn ``["prompt=question"]`` into a mapping.

    Raises:
        InputError: If one has no ``=``, or a name is given twice.
    """
    found: dict[str, str] = {}
    for assignment in assignments:
        name, _, original = (part.strip() for part in assignment.partition("="))
        if not name or not original:
            raise InputError(f"--column {assignment}: expected NAME=COLUMN, such as prompt=question")
        if name in found:
            raise InputError(f"--column {name}: given twice; leave one of them out")
        found[name] = original
    return found


def parse_weights(text: str) -> tuple[float, ...]:
    """Turn ``"2,1"`` into numbers.

    Raises:
        InputError: If one is not a number above 0.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < weight < math.inf for weight in found):
        raise InputError(
            f"--data-weights takes numbers above 0, separated by commas, such as 2,1; got {text!r}; leave out a "
            "DATA that is not to be read"
        )
    return found
