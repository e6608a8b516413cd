"""Bytes held at one moment, and over time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter

_MAX_POINTS = 4000


@dataclass(frozen=True, kw_only=True)
class MemorySnapshot:
    """The memory held at one moment."""

    total_bytes: int
    """Bytes of all live storages."""

    bytes_by_category: Mapping[str, int]
    """Category -> its bytes; categories without any are left out."""

    region: str | None
    """The region that was running; None outside any."""

    event: int = 0
    """How many changes (a storage made, freed or resized) came before: the time axis of a timeline."""


@dataclass(kw_only=True)
class Sample:
    """A mutable snapshot: a storage may later turn out to belong to another category."""

    event: int
    region: str | None
    total: int = 0
    by_category: dict[str, int] = field(default_factory=dict)

    def change(self, category: str, num_bytes: int) -> None:
        """Count an event that adds bytes, or removes them if negative."""
        self.event += 1
        self.total += num_bytes
        self.by_category[category] = self.by_category.get(category, 0) + num_bytes

    def move(self, num_bytes: int, source: str, target: str) -> None:
        """Move bytes to another category."""
        self.by_category[source] -= num_bytes
        self.by_category[target] = self.by_category.get(target, 0) + num_bytes

    def copy(self) -> Sample:
        return Sample(event=self.event, region=self.region, total=self.total, by_category=dict(self.by_category))

    def freeze(self) -> MemorySnapshot:
        """An immutable snapshot of this sample."""
        held = {name: num_bytes for name, num_bytes in self.by_category.items() if num_bytes}
        return MemorySnapshot(total_bytes=self.total, bytes_by_category=held, region=self.region, event=self.event)


class Timeline:
    """Samples over time, halved whenever there are too many: of two neighbours the higher one stays.

    The highest sample of all is never lost.

    Args:
        max_points: Bound on the points kept.
    """

    def __init__(self, max_points: int = _MAX_POINTS) -> None:
        self._max_points = max_points
        self._points: list[Sample] = []
        self._stride = 1
        self._num_in_last = 0

    def add(self, sample: Sample) -> None:
        """Keep a copy, unless a higher sample represents its stretch of events."""
        if self._points and self._num_in_last < self._stride:
            if sample.total > self._points[-1].total:
                self._points[-1] = sample.copy()
            self._num_in_last += 1
            return
        if len(self._points) >= self._max_points:
            self._halve()
        self._points.append(sample.copy())
        self._num_in_last = 1

    def since(self, event: int) -> list[Sample]:
        """The samples from an event on."""
        return self._points[bisect_left(self._points, event, key=attrgetter("event")) :]

    def freeze(self) -> tuple[MemorySnapshot, ...]:
        """The samples kept, in order of time."""
        return tuple(sample.freeze() for sample in self._points)

    def _halve(self) -> None:
        pairs = [self._points[index : index + 2] for index in range(0, len(self._points), 2)]
        self._points = [max(pair, key=attrgetter("total")) for pair in pairs]
        self._stride *= 2
