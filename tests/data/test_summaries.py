"""Distributions of counts."""

from __future__ import annotations

import pytest

from kvpref.data.summaries import LengthSummary, summarize


def test_summary_of_values():
    assert summarize(list(range(10, 0, -1))) == LengthSummary(mean=5.5, p50=5, p90=9, max=10)
    assert summarize([7]) == LengthSummary(mean=7.0, p50=7, p90=7, max=7)
    with pytest.raises(ValueError, match="no values"):
        summarize([])
