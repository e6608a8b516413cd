"""Middle and spread of repeated measurements: no measured number is reported alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of one quantity over the rounds of a measurement."""

    median: float
    """Half of the rounds were at or below it."""

    lower_quartile: float
    """A quarter of the rounds were at or below it."""

    upper_quartile: float
    """Three quarters of the rounds were at or below it."""

    num_rounds: int
    """How many rounds there were."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value; the quartiles interpolate linearly, and those of one value are the value."""
        if not values:
            raise ValueError("a spread needs at least one value; got none")
        if len(values) == 1:
            lower = median = upper = float(values[0])
        else:
            lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, lower_quartile=lower, upper_quartile=upper, num_rounds=len(values))

    @property
    def interquartile_range(self) -> float:
        """Distance of the quartiles, in the quantity's unit."""
        return self.upper_quartile - self.lower_quartile

    def scaled(self, factor: float) -> Spread:
        """The spread of every value times a positive factor."""
        return Spread(
            median=self.median * factor,
            lower_quartile=self.lower_quartile * factor,
            upper_quartile=self.upper_quartile * factor,
            num_rounds=self.num_rounds,
        )
