"""Segments of a level as rows of their own, and back.

Shape legend: T rows of a level, S segments, K of them kept, R segments of a bucket, L its width, P states left before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from kvpref.prefix.segments import BEGINNING, SegmentLayout
from kvpref.records.host_copies import to_device

Scan = Callable[[tuple[torch.Tensor, ...], torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""One recurrence over rows padded with zeros, which must not change the state: from tensors (R, L, ...) and the states
(R, ...) that the rows start from (None for zeros) to the output (R, L, ...) and the states (R, ...) after the last."""

_SPARE_ROWS = 63
"""Rows of padding that cost nothing: recurrences run in blocks of 64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bucket:
    """Segments of similar length.

    Attributes:
        segments: (R,) indices of the segments; None for all.
        rows: (n,) their rows in the level; None for all.
        slots: (n,) where these rows go among the R * L; None if they fill them.
        num_segments: R, the number of segments.
        width: L, the padded length.
    """

    segments: torch.Tensor | None
    rows: torch.Tensor | None
    slots: torch.Tensor | None
    num_segments: int
    width: int

    def pad(self, tensor: torch.Tensor) -> torch.Tensor:
        """(T, ...) to (R, L, ...), with zeros after each segment's end."""
        own = tensor if self.rows is None else tensor.index_select(0, self.rows)
        if self.slots is not None:
            empty = own.new_zeros(self.num_segments * self.width, *own.shape[1:])
            own = empty.index_copy(0, self.slots, own)
        return own.unflatten(0, (self.num_segments, self.width))

    def unpad(self, tensor: torch.Tensor) -> torch.Tensor:
        """(R, L, ...) to (n, ...)."""
        flat = tensor.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


class SegmentRows:
    """A level's segments on a device.

    Args:
        layout: Their lengths, the states they start from and which are kept.
        device: Where tensors go.
    """

    def __init__(self, layout: SegmentLayout, device: torch.device) -> None:
        self.layout, self._device = layout, device
        self._runs = [(parent, len(list(run))) for parent, run in groupby(layout.parents)]
        lengths = torch.tensor(layout.lengths, dtype=torch.int64)
        ends = lengths.cumsum(0)
        kept = torch.tensor(layout.kept, dtype=torch.int64)
        self.segment_of = self._on_device(torch.arange(len(lengths)).repeat_interleave(lengths))
        """(T,) int64, the segment of each row."""
        self.starts = self._on_device(ends - lengths)
        """(S,) int64, each segment's first row."""
        self.kept = self._on_device(kept)
        """(K,) int64, the segments whose states are kept."""
        self.kept_ends = self._on_device(ends[kept])
        """(K,) int64, the row after each kept segment's last."""
        self._buckets, self._order, self._kept_order = self._fill_buckets()

    @property
    def num_kept(self) -> int:
        """K, the number of kept segments."""
        return len(self.layout.kept)

    @property
    def begins_with_zeros(self) -> bool:
        """Whether all segments begin a sequence."""
        return all(parent == BEGINNING for parent, _ in self._runs)

    def begin(self, states: torch.Tensor | None) -> torch.Tensor | None:
        """The states that the segments start from.

        Args:
            states: (P, ...), the states that earlier segments left.

        Returns:
            The states (S, ...); None if all are zeros.
        """
        if self.begins_with_zeros:
            return None
        assert states is not None
        counts = {count for _, count in self._runs}
        if len(self._runs) == 1:
            ((parent, count),) = self._runs
            return states[parent : parent + 1].expand(count, *states.shape[1:])
        if len(counts) == 1 and [parent for parent, _ in self._runs] == list(range(len(states))):
            return states.unsqueeze(1).expand(-1, counts.pop(), *states.shape[1:]).flatten(0, 1)
        # Selected in parts: on CUDA the gradient of indexing is summed in no fixed order.
        parts = {BEGINNING: torch.zeros_like(states[:1]), **dict(enumerate(states.split(1)))}
        return torch.cat([parts[parent].expand(count, *states.shape[1:]) for parent, count in self._runs])

    def scan(
        self, step: Scan, tensors: tuple[torch.Tensor, ...], states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a recurrence over every segment.

        Args:
            step: The recurrence.
            tensors: Inputs of the recurrence, (T, ...) each.
            states: (P, ...), the states that earlier segments left.

        Returns:
            The output (T, ...), and the states (K, ...) after the last rows of kept segments; None if there are none.
        """
        initial = self.begin(states)
        outs, finals = [], []
        for bucket in self._buckets:
            own = initial if initial is None or bucket.segments is None else initial.index_select(0, bucket.segments)
            out, final = step(tuple(map(bucket.pad, tensors)), own)
            outs.append(bucket.unpad(out))
            finals.append(final)
        out = outs[0] if len(outs) == 1 else torch.cat(outs).index_select(0, self._order)
        if not self.num_kept:
            return out, None
        final = finals[0] if len(finals) == 1 else torch.cat(finals)
        return out, final if self._kept_order is None else final.index_select(0, self._kept_order)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor, self._device)

    def _fill_buckets(self) -> tuple[list[_Bucket], torch.Tensor, torch.Tensor | None]:
        """The buckets, and the place of each row and of each kept segment in their concatenated results."""
        lengths = torch.tensor(self.layout.lengths, dtype=torch.int64)
        rows = torch.arange(self.layout.num_rows).split(list(self.layout.lengths))
        members = list(_like_lengths(self.layout.lengths))
        buckets = []
        for bucket in members:
            width = max(self.layout.lengths[index] for index in bucket)
            is_full = all(self.layout.lengths[index] == width for index in bucket)
            is_whole = len(members) == 1
            own = torch.tensor(bucket, dtype=torch.int64)
            slots = [torch.arange(n) + place * width for place, n in enumerate(lengths[own].tolist())]
            buckets.append(
                _Bucket(
                    segments=None if is_whole else self._on_device(own),
                    rows=None if is_whole else self._on_device(torch.cat([rows[index] for index in bucket])),
                    slots=None if is_full else self._on_device(torch.cat(slots)),
                    num_segments=len(bucket),
                    width=width,
                )
            )
        segments = torch.tensor([index for bucket in members for index in bucket])
        order = torch.cat([rows[index] for index in segments.tolist()]).argsort()
        kept_order = segments.argsort()[list(self.layout.kept)]
        keeps_all = kept_order.tolist() == list(range(len(lengths)))
        return buckets, self._on_device(order), None if keeps_all else self._on_device(kept_order)


def _like_lengths(lengths: tuple[int, ...]) -> Iterator[list[int]]:
    """Segments in buckets with at most a quarter of padding; in their own order if one bucket takes them all."""
    bucket: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        width = lengths[bucket[0]] if bucket else lengths[index]
        if width - lengths[index] > max(width // 4, _SPARE_ROWS):
            yield sorted(bucket)
            bucket = []
        bucket.append(index)
    yield sorted(bucket)
