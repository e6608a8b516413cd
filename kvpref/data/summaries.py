"""Distributions of counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, kw_only=True)
class LengthSummary:
    """A distribution of token counts (or of sequence counts)."""

    mean: float
    """Arithmetic mean."""

    p50: int
    """Median: the smallest value that at least half of all do not exceed."""

    p90: int
    """The smallest value that at least 90% do not exceed."""

    max: int
    """The largest value."""


def summarize(values: Sequence[int]) -> LengthSummary:
    """Mean, median, 90th percentile and maximum of at least one value.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("there are no values to summarize")
    ordered = sorted(values)
    return LengthSummary(
        mean=sum(ordered) / len(ordered),
        p50=ordered[ceil(0.5 * len(ordered)) - 1],
        p90=ordered[ceil(0.9 * len(ordered)) - 1],
        max=ordered[-1],
    )
