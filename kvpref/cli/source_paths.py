"""Paths among the names of models, data and losses."""

from __future__ import annotations

import os
from pathlib import Path


def absolute_source(source: str) -> str:
    """`source` with its path absolute where it names something on this machine; hub names stay as they are.

    What follows a colon stays: the split of a dataset, the function of a loss.
    """
    if Path(source).exists():
        return os.path.abspath(source)
    path, colon, rest = source.rpartition(":")
    return f"{os.path.abspath(path)}:{rest}" if colon and Path(path).exists() else source


def same_source(one: str, other: str) -> bool:
    """Whether two names stand for the same file, folder or hub name."""
    return os.path.realpath(absolute_source(one)) == os.path.realpath(absolute_source(other))
