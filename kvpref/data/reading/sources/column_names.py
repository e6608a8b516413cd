"""Which columns of the data are read, and under which names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from kvpref.data.reading.columns import ROW_FIELDS
from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.shapes.ratings import RATINGS
from kvpref.errors import InputError

_MAX_NAMES_SHOWN = 12


class ColumnNames:
    """Renames the columns of raw rows, and remembers which were there.

    Args:
        renamed: By kvpref's name of a column the data's.
        extra: Columns that are read besides those of all rows, by kvpref's name.

    Raises:
        InputError: If nothing reads a column of one of kvpref's names.
    """

    def __init__(self, renamed: Mapping[str, str] | None = None, extra: Sequence[str] = ()) -> None:
        self._renamed = dict(renamed or {})
        self._read = {*ROW_FIELDS, *extra}
        self._originals = set(self._renamed.values())
        self._missing = {*self._originals}
        self._replaced = self._rivals(extra) | self._renamed
        self._moved = {
            original: name
            for name, original in self._renamed.items()
            if original in ROW_FIELDS and original not in self._renamed
        }
        self._seen: dict[str, None] = {}  # in the order of the data
        for name, original in self._renamed.items():
            if name not in self._read:
                near = get_close_matches(name, sorted(self._read), n=1)
                hint = f"; did you mean {near[0]}={original}?" if near else "; see docs/data.md for those that are read"
                raise InputError(f"column {name}={original}: nothing reads a column named {name!r}{hint}")

    def _rivals(self, extra: Sequence[str]) -> dict[str, str]:
        """Columns that mean what a renamed one does, with the name of the data that takes their place."""
        return {
            rival: original
            for name, original in self._renamed.items()
            for alike in RATINGS
            if name in alike
            for rival in alike
            if rival not in self._originals and rival not in extra
        }

    def final(self, name: str) -> str | None:
        """kvpref's name of a column of the data; None if another column takes its place.

        Of several it is the first. A rating that was chosen takes the place of all that mean the same.
        """
        if name in self._originals:
            return next(new for new, original in self._renamed.items() if original == name)
        return None if name in self._replaced else name

    def reads(self, name: str) -> bool:
        """Whether a column of the data, by its own name, is read at all."""
        return self.final(name) in self._read

    def is_field(self, name: str) -> bool:
        """Whether a column of the data is one of those that rows are made of."""
        return self.final(name) in ROW_FIELDS

    def rename(self, row: RawRow) -> RawRow:
        """The row with kvpref's names; what another column replaces is left out, and named so."""
        if not self._renamed or row.error is not None:
            return row
        value: Any = row.value
        keys = (*(value if isinstance(value, dict) else ()), *row.left_out)
        self._seen.update(dict.fromkeys(map(str, keys)))
        self._missing.difference_update(keys)
        if not isinstance(value, dict):
            return row
        new = {name: value[original] for name, original in self._renamed.items() if original in value}
        # A column of the same name is not read even where the other is missing: a table would have null there.
        kept = {key: item for key, item in value.items() if key not in self._originals and key not in self._replaced}
        replaced = [key for key in value if key in self._replaced and key not in self._originals]
        left_out = [
            f"{name} (replaced by {self._replaced[name]})" if name in self._replaced else name
            for name in (*replaced, *row.left_out)
        ]
        moved = tuple((original, name) for original, name in self._moved.items() if original in value)
        return replace(row, value={**kept, **new}, left_out=tuple(left_out), moved=moved)

    def missing(self) -> str | None:
        """What to say of the first column that no row so far had; None if all were there."""
        for name, original in self._renamed.items():
            if original in self._missing:
                near = get_close_matches(original, self._seen, n=1)
                found = ", ".join([*self._seen][:_MAX_NAMES_SHOWN]) or "none"
                hint = f"did you mean {name}={near[0]}?" if near else f"there are {found}"
                return f"column {name}={original}: no row has a column {original!r}; {hint}"
        return None
