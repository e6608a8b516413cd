"""How ranks agree before they act: by exchanging a few integers between host memories."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import distributed


class Agreement:
    """Reductions over all ranks, which must make the same calls in the same order.

    Args:
        group: A process group that reduces tensors in host memory; None if there is only one rank.
    """

    def __init__(self, group: distributed.ProcessGroup | None) -> None:
        self._group = group

    def most(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks.

        Args:
            values: Integers, equally many on every rank.
        """
        if self._group is None:
            return list(values)
        largest = torch.tensor(values, dtype=torch.int64)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=self._group)
        found: list[int] = largest.tolist()
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.most([int(flag)]) == [1]


def agreement() -> Agreement:
    """The agreement of all ranks of this run. The first call makes a process group, so all ranks must make it."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return Agreement(None)
    return _among(distributed.group.WORLD)


@cache
def _among(world: distributed.ProcessGroup) -> Agreement:
    # gloo, whatever the default is: NCCL reduces on the GPU, and reading the answer would block the host until
    # everything queued there is done.
    if distributed.get_backend(world) == "gloo":
        return Agreement(world)
    return Agreement(distributed.new_group(backend="gloo"))
