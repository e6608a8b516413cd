"""The planned steps as a batch sampler for `torch.utils.data.DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator

from kvpref.data.batching.planning import MicroBatch, StepPlanner
from kvpref.errors import InputError

STEPS_AHEAD = 2
"""How many steps beyond the current one a sampler names, for whoever prepares them ahead of use."""


class PlannedStep(tuple[MicroBatch, ...]):
    """One rank's micro-batches of an optimizer step, which know what comes next.

    Attributes:
        following: The micro-batches of the next `STEPS_AHEAD` steps of the epoch, fewer at its end. They travel with
            the step, so they stay right when steps are skipped or an iteration is dropped.
    """

    following: tuple[tuple[MicroBatch, ...], ...] = ()


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

    def __iter__(self) -> Iterator[PlannedStep]:
        own = [step[self.rank] for step in self.planner.steps(self.epoch)]
        for index, micro_batches in enumerate(own):
            step = PlannedStep(micro_batches)
            step.following = tuple(own[index + 1 : index + 1 + STEPS_AHEAD])
            yield step
