"""Ratios, ideals and verdicts of made-up rounds."""

from __future__ import annotations

import pytest
import torch

from kvpref.profiling.compare import comparison
from kvpref.profiling.compare.comparison import Case, Comparison, compare

CPU = torch.device("cpu")


def case(name: str, flops: int) -> Case:
    return Case(name=name, run=lambda: None, flops=flops, resident_bytes=lambda: 7, facts={"tokens": 3})


def test_ratios_are_taken_inside_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow phase hits a whole round: the ratio of the medians would be 20 / 4 = 5 here, the median ratio is 4."""
    rounds = {"shared": (2.0, 10.0, 4.0), "base": (8.0, 20.0, 40.0)}
    monkeypatch.setattr(comparison, "time_rounds", lambda *_: rounds)
    shared, base = compare([case("shared", 50), case("base", 100)], baseline="base", device=CPU)
    assert shared.speedup.median == 4.0
    assert shared.ideal == 2.0
    assert shared.efficiency.median == 2.0
    assert shared.rounds_ms == rounds["shared"]
    assert shared.time_ms.median == 4.0
    assert shared.peak_bytes == 7  # nothing is allocated beyond what is resident
    assert shared.facts == {"tokens": 3}
    without = compare([case("base", 1)], baseline="base", device=CPU, with_memory=False)
    assert without[0].peak_bytes is None
    assert (base.speedup.median, base.ideal, base.efficiency.median) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("bar", "verdict"), [(None, ""), (2.0, "met"), (2.01, "missed")])
def test_verdicts(monkeypatch: pytest.MonkeyPatch, bar: float | None, verdict: str) -> None:
    monkeypatch.setattr(comparison, "time_rounds", lambda *_: {"shared": (2.0,), "base": (8.0,)})
    results = compare([case("shared", 50), case("base", 100)], baseline="base", device=CPU)
    row = Comparison(name="row", baseline="base", results=results, bar=bar)
    assert [row.verdict(result) for result in results] == [verdict, ""]
    assert [result.name for result in row.contenders()] == ["shared"]


def test_cases_are_checked() -> None:
    with pytest.raises(ValueError, match="no case 'base' to compare with; there are: shared"):
        compare([case("shared", 1)], baseline="base", device=CPU)
    with pytest.raises(ValueError, match="different names; got a, a"):
        compare([case("a", 1), case("a", 1)], baseline="a", device=CPU)
