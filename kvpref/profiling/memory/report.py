"""Memory profiles as JSON and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpref.atomic_files import write_text
from kvpref.profiling.memory.profile import MemoryProfile
from kvpref.profiling.memory.style import in_order
from kvpref.profiling.memory.timeline import MemorySnapshot
from kvpref.profiling.provenance import Provenance

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The results of one run of the memory profiler."""

    title: str

    provenance: Provenance
    """Machine, versions and date."""

    settings: Mapping[str, Any]
    """How it was run; JSON values."""

    profiles: tuple[MemoryProfile, ...]
    """One per variant and number of responses."""

    skipped: Mapping[str, str]
    """Cases that were not measured, with the reason."""

    @property
    def variants(self) -> list[str]:
        """The measured variants, in order."""
        return list(dict.fromkeys(profile.variant for profile in self.profiles))

    @property
    def responses(self) -> list[int | None]:
        """The measured numbers of responses, in order; a single None if groups are whole."""
        return list(dict.fromkeys(profile.num_responses for profile in self.profiles))

    def find(self, variant: str, num_responses: int | None) -> MemoryProfile | None:
        """The profile of a case; None if it was not measured."""
        found = (p for p in self.profiles if p.variant == variant and p.num_responses == num_responses)
        return next(found, None)

    def largest(self) -> list[MemoryProfile]:
        """The profiles with the most responses, one per variant."""
        most = max(self.responses, key=lambda count: count or 0, default=None)
        return [profile for profile in self.profiles if profile.num_responses == most]

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "provenance": asdict(self.provenance),
            "settings": dict(self.settings),
            "profiles": [_profile_to_json(profile) for profile in self.profiles],
            "skipped": dict(self.skipped),
        }

    def write(self, path: Path) -> None:
        """Write the JSON, and the folder if it is missing."""
        write_text(path, json.dumps(self.to_json()) + "\n")


def _profile_to_json(profile: MemoryProfile) -> dict[str, Any]:
    size = profile.prefix_size
    return asdict(profile) | {
        "prefix_size": asdict(size) | {"layers": [*map(asdict, size.layers)], "num_bytes": size.num_bytes},
        "timeline": timeline_columns(profile.timeline),
    }


def timeline_columns(timeline: Sequence[MemorySnapshot]) -> dict[str, Any]:
    """A timeline as columns: the event and region of each point, and the bytes of each category."""
    names = in_order({name for point in timeline for name in point.bytes_by_category})
    return {
        "event": [point.event for point in timeline],
        "region": [point.region for point in timeline],
        "bytes": {name: [point.bytes_by_category.get(name, 0) for point in timeline] for name in names},
    }


def format_bytes(num_bytes: int) -> str:
    """Three significant digits, in a binary unit."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1024, larger
    digits = 0 if unit == "B" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def case_label(num_responses: int | None) -> str:
    """The label of a number of responses in tables."""
    return "peak" if num_responses is None else f"N = {num_responses}"


def peaks_table(report: MemoryReport) -> Table:
    """Peak bytes: a row per variant, a column per number of responses."""
    from rich.table import Table

    table = Table(
        title=f"{report.title}: peak memory of a training step",
        title_justify="left",
        caption=report.provenance.line(),
        caption_justify="left",
    )
    table.add_column("variant")
    for count in report.responses:
        table.add_column(case_label(count), justify="right")
    for variant in report.variants:
        found = [report.find(variant, count) for count in report.responses]
        table.add_row(
            variant, *("-" if profile is None else format_bytes(profile.peak.total_bytes) for profile in found)
        )
    return table


def breakdown_table(profiles: Sequence[MemoryProfile]) -> Table:
    """What was held at the peak: a row per category, a column per profile."""
    from rich.table import Table

    table = Table(title="held at the peak", title_justify="left")
    table.add_column("category")
    for profile in profiles:
        table.add_column(profile.name, justify="right")
    for name in in_order({name for profile in profiles for name in profile.peak.bytes_by_category}):
        cells = [profile.peak.bytes_by_category.get(name, 0) for profile in profiles]
        table.add_row(name, *(format_bytes(cell) if cell else "" for cell in cells))
    table.add_section()
    table.add_row("peak", *(format_bytes(profile.peak.total_bytes) for profile in profiles))
    table.add_row("in region", *(profile.peak.region or "-" for profile in profiles))
    if any(profile.reserved_bytes is not None for profile in profiles):
        table.add_row("reserved", *(format_bytes(profile.reserved_bytes or 0) for profile in profiles))
    return table


def prefix_lines(profiles: Sequence[MemoryProfile]) -> list[str]:
    """For each profile that keeps prefix keys and values, their size and its formula."""
    return [
        f"{p.name}: prefix K/V {p.prefix_bytes} bytes; by the formula {p.prefix_size} = {p.prefix_size.num_bytes}"
        for p in profiles
        if p.prefix_bytes or p.prefix_size.num_tokens
    ]
