"""Products of settings for parametrized tests: every pair of values in `make test`, the rest in `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*axes: Collection[Any]) -> list[Any]:
    """The product of the axes; what is not needed for a combination of each two values is marked `full`.

    Args:
        *axes: Hashable values, in the order of the test's parameters.
    """
    needed = set(covering(*axes))
    return [
        pytest.param(*values, id="-".join(map(str, values)), marks=() if values in needed else pytest.mark.full)
        for values in product(*axes)
    ]


def covering(*axes: Collection[Any]) -> list[tuple[Any, ...]]:
    """Combinations that hold every pair of values of two axes, chosen greedily: each time the one with the most new."""
    left = list(product(*axes))
    missing = {pair for values in left for pair in _pairs(values)}
    chosen = []
    while missing:
        best = max(left, key=lambda values: len(missing.intersection(_pairs(values))))
        chosen.append(best)
        left.remove(best)
        missing.difference_update(_pairs(best))
    return chosen


def _pairs(values: tuple[Any, ...]) -> Iterable[tuple[tuple[int, Any], tuple[int, Any]]]:
    return combinations(enumerate(values), 2)
