"""Rows of CSV and TSV files whose first line names the columns."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpref.data.reading.columns import PROMPT_COLUMNS
from kvpref.data.reading.json_text import RepeatedKeyError, decode_json
from kvpref.data.reading.raw_rows import RawRow
from kvpref.data.reading.sources.column_names import ColumnNames
from kvpref.data.reading.sources.packed import inner_suffix, read_lines
from kvpref.errors import InputError

TEXT_COLUMNS = frozenset(
    {
        *("prompt", "chosen", "rejected", "response", "completion", "output", "text", "input", "system"),
        *("chosen_response", "rejected_response", "id", "image"),
        *PROMPT_COLUMNS,
    }
)
"""Columns whose cells are text as they stand, unless they hold messages; all others are JSON where they can be."""

_MAX_CELL_CHARS = 2**27
"""Beyond this a quote is taken not to be closed."""

_PYTHON_MESSAGES = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)'\s*:")
_PYTHON_CONSTANTS = {"True": True, "False": False}


class _Lines:
    """Decoded lines for `csv`, which numbers them."""

    def __init__(self, path: Path) -> None:
        self._lines = read_lines(path)
        self.num_read = 0
        self.undecodable: int | None = None  # the first line since this was last cleared

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.num_read += 1
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:
                self.undecodable = self.undecodable or self.num_read
                yield line.decode("utf-8", errors="replace")


def read_csv(path: Path, names: ColumnNames) -> Iterator[RawRow]:
    """The rows, each with the line that it begins at. Empty cells are missing; see `TEXT_COLUMNS` for the others.

    Raises:
        InputError: If the first line names no columns that are read, or one of them twice.
    """
    header: list[str] | None = None
    for line, cells in _read_cells(path):
        location = f"{path}:{line}"
        if header is None:
            header = _check_header(cells, location, names)
        elif isinstance(cells, str):
            yield RawRow(location, error=cells)
        elif len(cells) != len(header):
            yield RawRow(
                location,
                error=f"{len(cells)} cells in a table of {len(header)} columns; put cells that hold the separator, "
                'quotes or line breaks in quotes, and write " inside them as ""',
            )
        else:
            yield _row(location, header, cells, names)


def count_csv(path: Path) -> int:
    """How many rows there are."""
    return max(0, sum(1 for _ in _read_cells(path)) - 1)


def _read_cells(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Per record that is not blank its first line, and its cells or what is wrong with it."""
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_CELL_CHARS))  # 131072 otherwise, less than a long prompt
    lines = _Lines(path)
    reader = csv.reader(lines, delimiter="\t" if inner_suffix(path) == ".tsv" else ",", strict=True)
    while True:
        first = lines.num_read + 1
        lines.undecodable = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, f"not valid CSV ({error})"
            continue
        if lines.undecodable is not None:
            yield first, f"invalid UTF-8 in line {lines.undecodable}; save the file as UTF-8"
        elif cells:
            yield first, cells


def _check_header(cells: list[str] | str, location: str, names: ColumnNames) -> list[str]:
    if isinstance(cells, str):
        raise InputError(f"{location}: {cells}")
    twice = [name for name in cells if cells.count(name) > 1]
    if twice:
        raise InputError(f"{location}: two columns are named {twice[0]!r}; rename one of them")
    if not any(map(names.is_field, cells)):
        raise InputError(
            f"{location}: no column is named as one that is read (see docs/data.md); found {', '.join(cells)}; name "
            "the columns in the first line, or give --column prompt=NAME"
        )
    return cells


def _row(location: str, header: list[str], cells: list[str], names: ColumnNames) -> RawRow:
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        final = names.final(name)
        if not cell or not names.reads(name):
            row[name] = cell or None
            continue
        if _PYTHON_MESSAGES.match(cell):
            return RawRow(
                location,
                error=f"`{name}` holds messages as Python prints them, not JSON; write them with json.dumps",
            )
        try:
            row[name] = _text_or_messages(cell) if final in TEXT_COLUMNS else _json_or_text(cell)
        except RepeatedKeyError as error:
            return RawRow(location, error=f"`{name}`: {error}")
    return RawRow(location, row)


def _json_or_text(cell: str) -> Any:
    if cell in _PYTHON_CONSTANTS:
        return _PYTHON_CONSTANTS[cell]
    try:
        return decode_json(cell)
    except RepeatedKeyError:
        raise
    except (ValueError, RecursionError):
        return cell


def _text_or_messages(cell: str) -> Any:
    if cell.lstrip()[:1] not in ("[", "{"):
        return cell
    try:
        value = _json_or_text(cell)
    except RepeatedKeyError:
        if _are_messages(json.loads(cell)):
            raise
        return cell
    return value if _are_messages(value) else cell


def _are_messages(value: Any) -> bool:
    messages = value if isinstance(value, list) else [value]
    return bool(messages) and all(map(_is_message, messages))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())
