"""All the trainer's meters between two log lines."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpref.data import StepBatcher
from kvpref.data.batching.steps import MicroBatch
from kvpref.training.loading.inputs import StepInputs
from kvpref.training.memory import MemoryMeter
from kvpref.training.meters import MetricMeter, TokenMeter, WorkMeter
from kvpref.training.step_runner import StepResult


class RunMeters:
    """The meters of a run.

    Args:
        device: The model's device.
        ranks_per_group: As in `TokenMeter`.

    Attributes:
        metrics: The loss's metrics.
        tokens: Tokens and groups.
        memory: Peaks of memory.
        work: Work of the ranks; None before there is a plan.
    """

    def __init__(self, device: torch.device, ranks_per_group: int = 1) -> None:
        self.metrics, self.tokens, self.memory = MetricMeter(), TokenMeter(ranks_per_group), MemoryMeter(device)
        self.work: WorkMeter | None = None

    def watch(self, batcher: StepBatcher) -> None:
        """Count the work of this plan's steps from now on."""
        self.work = WorkMeter(batcher)

    def add(self, inputs: StepInputs, result: StepResult, units: Sequence[float]) -> None:
        """Count a step; `tokens` has measured its time.

        Args:
            inputs: The step's inputs.
            result: The step's results.
            units: Loss units of each micro-batch.
        """
        for item, output, count, num_tokens in zip(
            inputs, result.outputs, units, result.num_forward_tokens, strict=True
        ):
            if not item.is_filler:
                self.metrics.add(output.metrics, count)
                # Chunks run each token of the step's tree once; a micro-batch's own tree is not built for its count.
                num_unique = num_tokens if inputs.joined else item.batch.num_unique_tokens
                self.tokens.add(item.batch, num_unique, num_tokens)
        seconds = self.tokens.stop()
        if self.work is not None:
            self.work.add([MicroBatch(item.group_indices, item.is_filler) for item in inputs], seconds)

    def pop(self, world_size: int) -> dict[str, float]:
        """The entries of a log line for the steps since the last one, over all ranks, which all have to call it."""
        self.tokens.gather(world_size)
        found = {**self.metrics.pop(world_size), **self.tokens.rates(world_size), **self.memory.pop(world_size)}
        return found | ({} if self.work is None else self.work.pop(world_size))
