"""A time profile as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpref.atomic_files import write_text
from kvpref.profiling.provenance import Provenance
from kvpref.profiling.step_time.profile import PARTS, PHASES, TimeEntry

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class TimeProfile:
    """The time of steps, by place."""

    clock: str
    """What was timed: ``CPU``, the calling thread, or ``CUDA kernels``, without the gaps between them."""

    num_steps: int
    """Number of profiled steps."""

    entries: tuple[TimeEntry, ...]
    """One per place that took time, means over the steps."""

    profiled_ms: float
    """A step from start to end under the profiler, in milliseconds."""

    plain_ms: float
    """The same without the profiler."""

    @property
    def total_ms(self) -> float:
        """The sum of the entries: on the CPU `profiled_ms`, on CUDA the device's busy time."""
        return sum(entry.ms for entry in self.entries)

    def ms(self, **place: str) -> float:
        """The time of the places with this stage, phase or part."""
        return sum(
            entry.ms
            for entry in self.entries
            if all(getattr(entry.place, name) == value for name, value in place.items())
        )


@dataclass(frozen=True, kw_only=True)
class TimeReport:
    """The results of one run of `kvpref profile time`."""

    title: str

    provenance: Provenance
    """Machine, versions and date."""

    settings: Mapping[str, Any]
    """How it was run; JSON values."""

    facts: Mapping[str, int]
    """Counts of the step."""

    profile: TimeProfile

    def to_json(self) -> dict[str, Any]:
        profile = self.profile
        return {
            "title": self.title,
            "provenance": asdict(self.provenance),
            "settings": dict(self.settings),
            "facts": dict(self.facts),
            "clock": profile.clock,
            "num_steps": profile.num_steps,
            "step_ms": profile.total_ms,
            "profiled_ms": profile.profiled_ms,
            "plain_ms": profile.plain_ms,
            "parts_ms": {part: profile.ms(part=part) for part in PARTS},
            "entries": [asdict(entry.place) | {"ms": entry.ms} for entry in profile.entries],
        }

    def write(self, path: Path) -> None:
        """Write the JSON, and the folder if it is missing."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")


def time_table(report: TimeReport) -> Table:
    """A row per stage and part, a column per phase that occurs; the last row is the sum."""
    from rich.table import Table

    profile = report.profile
    phases = [phase for phase in PHASES[:-1] if profile.ms(phase=phase)]
    table = Table(
        title=f"{report.title}: milliseconds per step, {profile.clock}",
        title_justify="left",
        caption=f"{report.provenance.line()}\na step takes {profile.plain_ms:.1f} ms without the profiler, "
        f"{profile.profiled_ms:.1f} ms with it",
        caption_justify="left",
    )
    table.add_column("where", no_wrap=True)
    table.add_column("what", no_wrap=True)
    for title in (*phases, "total", "share"):
        table.add_column(title, justify="right")
    for stage in _in_order(entry.place.stage for entry in profile.entries):
        parts = _in_order(entry.place.part for entry in profile.entries if entry.place.stage == stage)
        for index, part in enumerate(sorted(parts, key=PARTS.index)):
            cells = [profile.ms(stage=stage, part=part, phase=phase) for phase in phases]
            total = profile.ms(stage=stage, part=part)
            table.add_row(
                stage if index == 0 else "",
                part if part != stage else "",
                *(f"{ms:.2f}" if ms else "" for ms in cells),
                *(f"{total:.2f}", f"{total / profile.total_ms:.1%}"),
                end_section=index == len(parts) - 1,
            )
    sums = [f"{profile.ms(phase=phase):.2f}" for phase in phases]
    table.add_row("all", "", *sums, f"{profile.total_ms:.2f}", "100.0%")
    return table


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
