"""The batched steps as a batch sampler for `torch.utils.data.DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator

from kvpref.data.batching.steps import MicroBatch, StepBatcher
from kvpref.errors import InputError

STEPS_AHEAD = 2
"""How many steps beyond the current one a sampler announces, for preparation ahead of use."""


class RankStep(tuple[MicroBatch, ...]):
    """One rank's micro-batches of an optimizer step, along with the steps that follow.

    Attributes:
        following: The micro-batches of the next `STEPS_AHEAD` steps of the epoch, fewer at its end. They travel with
            the step, so they stay correct if steps are skipped or an iteration is dropped.
    """

    following: tuple[tuple[MicroBatch, ...], ...] = ()


class StepSampler:
    """Yields this rank's micro-batches of each optimizer step; pass it as a DataLoader's ``batch_sampler``.

    Args:
        batcher: Plans the steps.
        rank: This process's rank, below the batcher's world size.

    Raises:
        InputError: If the rank is out of range.
    """

    def __init__(self, batcher: StepBatcher, rank: int = 0) -> None:
        if not 0 <= rank < batcher.options.world_size:
            raise InputError(f"rank must be from 0 to world_size - 1 = {batcher.options.world_size - 1}; got {rank}")
        self.batcher = batcher
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration plans."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batcher.num_steps

    def __iter__(self) -> Iterator[RankStep]:
        own = [step[self.rank] for step in self.batcher.steps(self.epoch)]
        for index, micro_batches in enumerate(own):
            step = RankStep(micro_batches)
            step.following = tuple(own[index + 1 : index + 1 + STEPS_AHEAD])
            yield step
