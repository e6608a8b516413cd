"""The words of pictures of speed-ups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import check_words, figures_drawn

from kvpref.profiling.compare.comparison import CaseResult, Comparison
from kvpref.profiling.compare.plot import draw
from kvpref.profiling.compare.report import Report
from kvpref.profiling.compare.spread import Spread
from kvpref.profiling.provenance import Provenance

pytest.importorskip("matplotlib")


def result(name: str, speedups: list[float], ideal: float) -> CaseResult:
    spread = Spread.of(speedups)
    return CaseResult(
        name=name,
        time_ms=Spread.of([1.0]),
        speedup=spread,
        ideal=ideal,
        efficiency=spread.scaled(1 / ideal),
        flops=1,
        peak_bytes=None,
        rounds_ms=(1.0,),
        facts={},
    )


@pytest.mark.parametrize("name", ["step", "a workload whose name says in many words what is in it"])
@pytest.mark.parametrize("title", ["short", "./models/a-long-name on 4096 groups of " + "data/" * 30 + "pairs.jsonl"])
@pytest.mark.parametrize("num_rows", [1, 9])
def test_all_words_have_room(name: str, title: str, num_rows: int, tmp_path: Path) -> None:
    comparisons = tuple(
        Comparison(
            name=f"{name} {index}",
            baseline=("packed", "padded")[index % 2],
            results=(result("two_pass", [9.0, 12.0], 10.0), result("bounded", [1.0, 1.2], 12.0)),
        )
        for index in range(num_rows)
    )
    report = Report(
        title=title,
        provenance=Provenance.collect(torch.device("cpu")),
        settings={},
        comparisons=comparisons,
        skipped={},
    )
    with figures_drawn() as figures:
        assert draw(report, tmp_path / "bench.png")
    check_words(figures[0])
    assert "".join(figures[0].get_suptitle().split()) == "".join(title.split())  # wrapped, not shortened
