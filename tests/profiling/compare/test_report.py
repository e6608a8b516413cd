"""JSON, table, picture and provenance of made-up results."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import kvpref
from kvpref.profiling.compare.comparison import CaseResult, Comparison
from kvpref.profiling.compare.plot import draw
from kvpref.profiling.compare.report import Column, Report, comparison_table, format_ms
from kvpref.profiling.compare.spread import Spread
from kvpref.profiling.provenance import Provenance

CPU = torch.device("cpu")


def result(name: str, times: list[float], speedups: list[float], ideal: float) -> CaseResult:
    return CaseResult(
        name=name,
        time_ms=Spread.of(times),
        speedup=Spread.of(speedups),
        ideal=ideal,
        efficiency=Spread.of(speedups).scaled(1 / ideal),
        flops=10,
        peak_bytes=None,
        rounds_ms=tuple(times),
        facts={"tokens": 1234},
    )


@pytest.fixture
def report() -> Report:
    rows = (
        Comparison(
            name="short",
            baseline="packed",
            results=(result("two_pass", [50.0, 52.0], [1.5, 1.7], 1.6), result("packed", [80.0], [1.0], 1.0)),
            bar=0.95,
        ),
        Comparison(
            name="long",
            baseline="packed",
            results=(result("two_pass", [5.0], [2.0], 4.0), result("packed", [10.0], [1.0], 1.0)),
            bar=0.95,
        ),
    )
    return Report(
        title="a sweep",
        provenance=Provenance.collect(CPU),
        settings={"quick": True},
        comparisons=rows,
        skipped={"absent": "no file"},
    )


def test_json_holds_figures_verdicts_and_machine(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "deep" / "report.json")
    values = json.loads((tmp_path / "deep" / "report.json").read_text())
    short, long = values["comparisons"]
    assert short["verdicts"] == {"two_pass": "met"}
    assert long["verdicts"] == {"two_pass": "missed"}
    assert short["results"][0]["speedup"]["median"] == 1.6
    assert short["results"][0]["rounds_ms"] == [50.0, 52.0]
    assert short["results"][0]["facts"] == {"tokens": 1234}
    assert values["skipped"] == {"absent": "no file"}
    assert values["provenance"]["kvpref_version"] == kvpref.__version__
    assert values["provenance"]["torch_version"] == torch.__version__
    assert values["provenance"]["num_threads"] == torch.get_num_threads()
    assert values["provenance"]["gpu"] is None
    assert values["provenance"]["cpu"]


def test_the_table_prints_the_ideal_and_the_bar_beside_each_figure(report: Report) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(report, [Column("tokens", lambda item: str(item.facts["tokens"]))]))
    lines = console.export_text().splitlines()
    (short,) = (line for line in lines if "short" in line)
    for cell in ("1234", "1.60x (1.55..1.65)", "51.0 ms (50.5..51.5)", "1.00", ">= 0.95 met"):
        assert cell in short
    (long,) = (line for line in lines if "long" in line)
    for cell in ("2.00x", "4.00x", "0.50", ">= 0.95 missed"):
        assert cell in long


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([2.0], "2.00 ms (2.00..2.00)"),
        ([0.5], "0.50 ms (0.50..0.50)"),
        ([250.0], "250 ms (250..250)"),
        ([2500.0], "2500 ms (2500..2500)"),
        ([12340.0], "12.3 s (12.3..12.3)"),
    ],
)
def test_times_keep_the_digits_that_mean_something(values: list[float], text: str) -> None:
    assert format_ms(Spread.of(values)) == text


def test_the_picture_is_a_png(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw(report, tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_nothing_is_drawn(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw(report, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()
