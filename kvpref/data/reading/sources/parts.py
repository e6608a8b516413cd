"""What of a source is read: `NAME:SPLIT[FROM:TO]`, in the notation of `datasets`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import NamedTuple

from kvpref.errors import InputError

_BOUND = r"(-?\d[\d_]*%?)?"
_SLICE = re.compile(rf"\[{_BOUND}:{_BOUND}\]$")
_TAIL = re.compile(r"\[[^\[\]]*\]?$")
_SPLIT = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class Slice:
    """Rows from one place up to another, as in Python; negative numbers count from the end.

    Args:
        start: None begins at the first row.
        stop: None goes to the last.
        in_percent: Whether the two are percentages of all rows, rounded to whole rows as `datasets` does.
    """

    start: int | None
    stop: int | None
    in_percent: bool = False

    @classmethod
    def parse(cls, text: str) -> Slice:
        """``"[10:20]"`` or ``"[10%:20%]"``.

        Raises:
            InputError: If it has another form.
        """
        found = _SLICE.fullmatch(text)
        bounds = found.groups() if found else ()
        units = {bound.endswith("%") for bound in bounds if bound}
        if not found or len(units) > 1:
            raise InputError(
                f"cannot read the slice {text!r}; expected [FROM:TO], in rows or in percent, such as [:1000], [5:6] or "
                "[10%:20%]"
            )
        start, stop = (None if not bound else int(bound.rstrip("%")) for bound in bounds)
        return cls(start, stop, units == {True})

    def __str__(self) -> str:
        unit = "%" if self.in_percent else ""
        start, stop = ("" if bound is None else f"{bound}{unit}" for bound in (self.start, self.stop))
        return f"[{start}:{stop}]"

    def bounds(self, count: Callable[[], int]) -> tuple[int, int | None]:
        """The first row and the one behind the last, counted from 0; None goes to the last.

        Args:
            count: Gives the number of all rows; called only where the slice depends on it.
        """
        if not self.in_percent and (self.start or 0) >= 0 and (self.stop or 0) >= 0:
            return self.start or 0, self.stop
        number = count()
        start, stop = (
            bound if bound is None or not self.in_percent else round(bound * number / 100)
            for bound in (self.start, self.stop)
        )
        return slice(start, stop).indices(number)[:2]

    def refuse_empty(self, number: int, source: str) -> None:
        """Raise InputError since the slice holds none of `number` rows, unless there are none at all."""
        if number:
            rows = f"{number} row{'' if number == 1 else 's'}"
            raise InputError(f"{source}: the slice {self} of {rows} is empty; give one that holds some")


class Part(NamedTuple):
    """A part of a source.

    Attributes:
        split: Its name; None where none was given.
        slice: Rows of the split; None for all.
    """

    split: str | None = None
    slice: Slice | None = None

    def only_train(self, source: str, what: str) -> Slice | None:
        """The rows, of a source that is a single split.

        Raises:
            InputError: If another split than ``train`` was asked for.
        """
        if self.split not in (None, "train"):
            raise InputError(
                f"{source}: {what} is one split, train, and has no {self.split!r}; leave the name out (a slice such as "
                "[:1000] may follow)"
            )
        return self.slice


def parse_part(text: str) -> Part:
    """``SPLIT``, ``SPLIT[FROM:TO]`` or ``[FROM:TO]``.

    Raises:
        InputError: If it has another form.
    """
    brackets = _TAIL.search(text)
    split = text[: brackets.start()] if brackets else text
    if "+" in split:
        raise InputError(
            f"cannot read several splits as one, as {text!r} asks; name each of them, as in A:train A:test"
        )
    if split and not _SPLIT.fullmatch(split):
        raise InputError(f"cannot read the split {text!r}; expected its name, such as train, or train[:1000]")
    return Part(split or None, Slice.parse(brackets[0]) if brackets else None)


def parse_source(text: str, split: str | None = None) -> tuple[str, Part]:
    """A name as it was given, as path or hub name, and the part that is meant.

    Args:
        text: ``NAME``, ``NAME:SPLIT``, ``NAME:SPLIT[FROM:TO]``, ``NAME:[FROM:TO]`` or ``NAME[FROM:TO]``.
        split: What `DataOptions.split` says.

    Raises:
        InputError: If the part has another form, or is given twice.
    """
    name, own = _divide(text)
    if split is None:
        return name, parse_part(own)
    if own:
        raise InputError(
            f"{text}: names its part itself, and the split is given as {split!r} too; leave one of them out"
        )
    return name, parse_part(split)


def _divide(text: str) -> tuple[str, str]:
    if Path(text).exists():
        return text, ""
    brackets = _TAIL.search(text)
    # A pattern such as rows-[:].jsonl ends in its suffix; one that ends in brackets matches something.
    if brackets and ":" not in brackets[0] and not Path(text[: brackets.start()]).exists() and glob(text):
        brackets = None
    head, rows = (text[: brackets.start()], brackets[0]) if brackets else (text, "")
    if Path(head).exists():
        return head, rows
    name, colon, split = head.rpartition(":")
    if colon and ((not split and rows) or _SPLIT.fullmatch(split)):
        return name, split + rows
    return head, rows


def is_pattern(name: str) -> bool:
    """Whether a name stands for all files that match it."""
    return has_magic(name) and not Path(name).exists()
