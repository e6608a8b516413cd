"""The peaks in docs/memory.md are those that were measured."""

from __future__ import annotations

import json

from markdown_pages import DOCS, ROOT, section, tables

from kvpref.profiling.memory.report import format_bytes


def test_peaks_are_those_that_were_measured() -> None:
    path = ROOT / "benchmarks" / "results" / "memory_profile.json"
    rows = json.loads(path.read_text())["profiles"]
    table = next(tables(section(DOCS / "memory.md", "Measured")))
    for stated in table:
        variant, *peaks = stated.values()
        found = [format_bytes(row["peak"]["total_bytes"]) for row in rows if f"`{row['variant']}`" == variant]
        assert len(found) == 4
        assert peaks == found
    assert {row["peak of a step"] for row in table} == {f"`{row['variant']}`" for row in rows}
