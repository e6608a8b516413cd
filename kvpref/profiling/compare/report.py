"""Comparisons as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvpref.atomic_files import write_text
from kvpref.profiling.compare.comparison import CaseResult, Comparison
from kvpref.profiling.compare.spread import Spread
from kvpref.profiling.provenance import Provenance

if TYPE_CHECKING:
    from rich.table import Table


class Column(NamedTuple):
    """One more column of a table of comparisons."""

    title: str
    """The column's heading."""

    text: Callable[[CaseResult], str]
    """Gives the cell of a case."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of one benchmark run."""

    title: str

    provenance: Provenance
    """Machine, versions and date."""

    settings: Mapping[str, Any]
    """How it was run; JSON values."""

    comparisons: tuple[Comparison, ...]
    """One per measured setting."""

    skipped: Mapping[str, str]
    """Settings or cases that were not measured, with the reason."""

    def to_json(self) -> dict[str, Any]:
        """JSON values; every comparison with its verdicts."""
        rows = [
            asdict(comparison) | {"verdicts": {r.name: comparison.verdict(r) for r in comparison.contenders()}}
            for comparison in self.comparisons
        ]
        return {
            "title": self.title,
            "provenance": asdict(self.provenance),
            "settings": dict(self.settings),
            "comparisons": rows,
            "skipped": dict(self.skipped),
        }

    def write(self, path: Path) -> None:
        """Write the JSON, and the folder if it is missing."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")


def comparison_table(report: Report, extra: Sequence[Column] = ()) -> Table:
    """Medians, their spread, and the ideal beside each speed-up.

    Args:
        report: The report to print.
        extra: Columns between the times and the speed-ups.
    """
    from rich.table import Table

    barred = any(comparison.bar is not None for comparison in report.comparisons)
    table = Table(
        title=report.title,
        title_justify="left",
        caption=f"{report.provenance.line()}\nmedian (quartiles) over the rounds; efficiency = speed-up / ideal",
        caption_justify="left",
    )
    table.add_column("setting")
    table.add_column("case")
    for title in ("time", *(column.title for column in extra), "speed-up", "ideal", "efficiency"):
        table.add_column(title, justify="right")
    if barred:
        table.add_column("bar")
    for comparison in report.comparisons:
        for index, result in enumerate(comparison.results):
            cells = [comparison.name if index == 0 else "", result.name, format_ms(result.time_ms)]
            cells += [column.text(result) for column in extra]
            cells += ["1", "1", "1"] if result.name == comparison.baseline else _ratios(result)
            if barred:
                verdict = comparison.verdict(result)
                cells.append(f">= {comparison.bar:.2f} {verdict}" if verdict else "")
            table.add_row(*cells, end_section=index == len(comparison.results) - 1)
    return table


def format_ms(spread: Spread) -> str:
    """Milliseconds with three significant digits, or seconds above ten."""
    unit, factor = ("s", 1e-3) if spread.median >= 10_000 else ("ms", 1.0)
    digits = max(0, 2 - len(str(int(spread.median * factor))) + 1)
    low, middle, high = (
        f"{value * factor:.{digits}f}" for value in (spread.lower_quartile, spread.median, spread.upper_quartile)
    )
    return f"{middle} {unit} ({low}..{high})"


def _ratios(result: CaseResult) -> list[str]:
    speedup = result.speedup
    return [
        f"{speedup.median:.2f}x ({speedup.lower_quartile:.2f}..{speedup.upper_quartile:.2f})",
        f"{result.ideal:.2f}x",
        f"{result.efficiency.median:.2f}",
    ]
