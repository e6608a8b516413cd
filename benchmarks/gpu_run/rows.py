"""What a row of the GPU run found; standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Status = Literal["passed", "failed", "measured", "skipped"]


class Figure(NamedTuple):
    """A number and its unit."""

    value: float
    unit: str

    def __str__(self) -> str:
        value = float(self.value)  # in results, numbers that JSON cannot hold are words
        number = str(int(value)) if value.is_integer() else f"{value:.4g}"
        return f"{number} {self.unit}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one row."""

    status: Status
    """``passed`` and ``failed`` by the row's bar; ``measured`` has none; ``skipped`` has not run, see `reason`."""

    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Name -> number with its unit."""

    bar: str | None = None
    """What the row is held to, in words."""

    reason: str | None = None
    """Why it failed or did not run, or what the figures leave out."""

    def to_json(self) -> dict[str, Any]:
        """The row as plain values for JSON."""
        figures = {
            name: {"value": value if math.isfinite(value) else str(value), "unit": unit}
            for name, (value, unit) in self.figures.items()
        }
        return {"status": self.status, "figures": figures, "bar": self.bar, "reason": self.reason}


Rows = dict[str, Callable[[], Finding]]
"""Name -> what finds out; in the order in which they run."""


def skipped(reason: str) -> Finding:
    """A row that cannot run here."""
    return Finding(status="skipped", reason=reason)


def failed(reason: str) -> Finding:
    """A row that broke."""
    return Finding(status="failed", reason=reason)


def measured(figures: Mapping[str, Figure], *, bar: str | None = None, reason: str | None = None) -> Finding:
    """A row whose figures are not judged."""
    return Finding(status="measured", figures=figures, bar=bar, reason=reason)


def judged(*, met: bool, bar: str, figures: Mapping[str, Figure], reason: str | None = None) -> Finding:
    """A row whose figures are held to a bar."""
    return Finding(status="passed" if met else "failed", figures=figures, bar=bar, reason=reason)
