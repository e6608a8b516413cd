"""The results file of the GPU run, written after every row, and its table; standard library only."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_run.rows import Figure, Finding
from gpu_run.stages import STAGES, Stage

FILE_NAME = "gpu.json"
FULL_TABLE_ROWS = 12
"""A stage with more rows shows those that did not pass, and counts the others."""


class Results:
    """All rows so far.

    Args:
        path: The JSON file.
        dry_run: Whether figures mean anything.
    """

    def __init__(self, path: Path, *, dry_run: bool) -> None:
        self.path, self.dry_run = path, dry_run
        self.about: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []
        self.stage_seconds: dict[str, float] = {}

    def add(self, stage: Stage, name: str, finding: dict[str, Any]) -> None:
        """Keep a row and write the file, so that a killed driver loses no finished row."""
        self.rows.append({"stage": stage.name, "name": name, **finding})
        self.write()

    def write(self) -> None:
        """Write the whole file atomically."""
        content = {
            "about": self.about,
            "dry_run": self.dry_run,
            "stages": [
                {"name": stage.name, "title": stage.title, "seconds": self.stage_seconds[stage.name]}
                for stage in STAGES
                if stage.name in self.stage_seconds
            ],
            "rows": self.rows,
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(partial, self.path)

    @property
    def has_failures(self) -> bool:
        """Whether a row failed."""
        return any(row["status"] == "failed" for row in self.rows)


def row_line(row: dict[str, Any]) -> str:
    """One row as text."""
    parts = [f"{row['name']}: {row['status']}", figures_text(row)]
    parts += [f"bar {row['bar']}"] if row["bar"] else []
    parts += [row["reason"]] if row["reason"] else []
    return "; ".join(filter(None, parts))


def figures_text(row: dict[str, Any]) -> str:
    """The figures of a row as text."""
    return ", ".join(f"{name} {Figure(**figure)}" for name, figure in row["figures"].items())


def table(results: Results) -> list[str]:
    """Lines for the end of the run: every stage, its rows, and the counts."""
    lines: list[str] = []
    for stage in STAGES:
        rows = [row for row in results.rows if row["stage"] == stage.name]
        counts = Counter(row["status"] for row in rows)
        seconds = results.stage_seconds.get(stage.name, 0.0)
        lines.append(f"{stage.name}: {stage.title} ({counted(counts)}, {seconds:.0f} s)")
        shown = rows if len(rows) <= FULL_TABLE_ROWS else _worth_a_line(rows)
        lines += [f"  {row_line(row)}" for row in shown]
    return [*lines, f"in all: {counted(Counter(row['status'] for row in results.rows))}"]


def counted(counts: Counter[str]) -> str:
    """Counts as text, such as ``3 passed, 1 failed``."""
    return ", ".join(f"{count} {status}" for status, count in counts.items()) or "no rows"


def _worth_a_line(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["status"] in ("failed", "measured")]


def not_run(reason: str) -> dict[str, Any]:
    """The result of a row that was never started."""
    return Finding(status="skipped", reason=reason).to_json()


def broken(reason: str) -> dict[str, Any]:
    """The result of a row that killed its process or never ended."""
    return Finding(status="failed", reason=reason).to_json()
