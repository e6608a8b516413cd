"""The planned steps as a batch sampler for `torch.utils.data.DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator

from kvpref.data.planning import MicroBatch, StepPlanner
from kvpref.errors import InputError


class StepSampler:
    """Yields this rank's micro-batches of each optimizer step; pass it as a DataLoader's ``batch_sampler``.

    Args:
        planner: Plans the steps.
        rank: This process's rank, below the planner's world size.

    Raises:
        InputError: If the rank is out of range.
    """

    def __init__(self, planner: StepPlanner, rank: int = 0) -> None:
        if not 0 <= rank < planner.options.world_size:
            raise InputError(f"rank must be from 0 to world_size - 1 = {planner.options.world_size - 1}; got {rank}")
        self.planner = planner
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration plans."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.planner.num_steps

    def __iter__(self) -> Iterator[tuple[MicroBatch, ...]]:
        for step in self.planner.steps(self.epoch):
            yield step[self.rank]
