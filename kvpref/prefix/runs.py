"""Runs of neighbouring tokens, as ranges."""

from __future__ import annotations

from collections.abc import Iterable

Runs = tuple[tuple[int, int], ...]
"""Ranges [first, stop), in order."""


def joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """The same tokens, with neighbours as one run: models find runs by looking for tokens that are no text."""
    found: list[tuple[int, int]] = []
    for first, stop in runs:
        if found and found[-1][1] == first:
            first = found.pop()[0]
        found.append((first, stop))
    return tuple(found)
