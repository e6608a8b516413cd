"""Paths among the names of models, data and losses."""

from __future__ import annotations

import os
import re
from glob import glob, has_magic
from pathlib import Path

_SLICE = re.compile(r"\[[^\[\]]*:[^\[\]]*\]$")
"""Rows of a dataset, as `kvpref.data` reads them."""


def absolute_source(source: str) -> str:
    """`source` with its path absolute where it names something on this machine; hub names stay as they are.

    What follows a colon stays: the split of a dataset, the function of a loss; and so does a slice.
    """
    found = _find_path(source)
    return source if found is None else f"{os.path.abspath(found[0])}{found[1]}"


def local_paths(source: str) -> list[Path]:
    """The files and folders of this machine that `source` names; several where it is a pattern, none of a hub."""
    found = _find_path(source)
    if found is None:
        return []
    return [Path(found[0])] if Path(found[0]).exists() else [Path(path) for path in glob(found[0], recursive=True)]


def _find_path(source: str) -> tuple[str, str] | None:
    """The path or pattern that `source` begins with, and what follows it; None if nothing is there."""
    brackets = _SLICE.search(source)
    head, rows = (source[: brackets.start()], brackets[0]) if brackets else (source, "")
    path, colon, split = head.rpartition(":")
    for name, rest in ((source, ""), (head, rows), (path, f"{colon}{split}{rows}")):
        if name and (Path(name).exists() or (has_magic(name) and glob(name, recursive=True))):
            return name, rest
    return None


def absolute_sources(sources: str | list[str]) -> str | list[str]:
    """`absolute_source` of one or of each."""
    return absolute_source(sources) if isinstance(sources, str) else [absolute_source(source) for source in sources]


def same_sources(one: str | list[str], other: str | list[str]) -> bool:
    """Whether names stand for the same files, folders or hub names, in the same order."""
    first, second = ([names] if isinstance(names, str) else names for names in (one, other))
    return [*map(_real_source, first)] == [*map(_real_source, second)]


def _real_source(source: str) -> str:
    return os.path.realpath(absolute_source(source))
