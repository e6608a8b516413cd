"""Medians and quartiles."""

from __future__ import annotations

import pytest

from kvpref.profiling.compare.spread import Spread


def test_quartiles_interpolate() -> None:
    spread = Spread.of([4.0, 1.0, 2.0, 8.0])
    # Sorted 1 2 4 8: the quartiles stand at places 0.75, 1.5 and 2.25.
    assert (spread.lower_quartile, spread.median, spread.upper_quartile) == (1.75, 3.0, 5.0)
    assert spread.interquartile_range == 3.25
    assert spread.num_rounds == 4


def test_one_value_has_no_spread() -> None:
    assert Spread.of([2]) == Spread(median=2.0, lower_quartile=2.0, upper_quartile=2.0, num_rounds=1)


def test_scaling_keeps_the_rounds() -> None:
    scaled = Spread.of([1.0, 2.0, 3.0]).scaled(0.5)
    assert (scaled.lower_quartile, scaled.median, scaled.upper_quartile, scaled.num_rounds) == (0.75, 1.0, 1.25, 3)


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        Spread.of([])
