"""One mixer while it runs in a pass: the states it starts from, and those it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvpref.ops.recurrent import Scan, SegmentRows

Function = Callable[..., Any]

Advance = Callable[
    [SegmentRows, tuple[torch.Tensor, ...], torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]
]
"""From a level's segments, their rows of some tensors (T, ...) and the states (P, ...) left earlier to the output
(T, ...) and the states (K, ...) that kept segments leave."""


class MixerCall:
    """The states of one mixer in one pass. A mixer may have several, always used in the same order.

    Attributes:
        left: The states that the last level's kept segments leave, in order; empty if none is kept.

    Args:
        levels: The levels of the pass's row, one after another.
        before: The states that earlier passes left, (P, ...) each; empty if the first level starts from zeros.
    """

    def __init__(self, levels: Sequence[SegmentRows], before: Sequence[torch.Tensor]) -> None:
        self.left: list[torch.Tensor] = []
        self._levels, self._before = levels, list(reversed(before))

    def advance(self, step: Advance, *tensors: torch.Tensor) -> torch.Tensor:
        """Carry the next state through the row, level after level.

        Args:
            step: The recurrence.
            tensors: The recurrence's inputs, (T, ...) each, over all levels.

        Returns:
            The output, (T, ...).
        """
        states = self._before.pop() if self._before else None
        outs = []
        num_rows = [level.layout.num_rows for level in self._levels]
        # Autograd would copy the gradient of a split, even if there is only one part.
        parts = [(tensor,) if len(num_rows) == 1 else tensor.split(num_rows) for tensor in tensors]
        for level, rows in zip(self._levels, zip(*parts, strict=True), strict=True):
            out, states = step(level, rows, states)
            outs.append(out)
        if states is not None:
            self.left.append(states)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def scan(self, scan: Scan, *tensors: torch.Tensor) -> torch.Tensor:
        """`advance` with a recurrence over rows of one segment each."""

        def step(
            segments: SegmentRows, rows: tuple[torch.Tensor, ...], states: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            return segments.scan(scan, rows, states)

        return self.advance(step, *tensors)


def in_wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32, or in its own dtype if wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
