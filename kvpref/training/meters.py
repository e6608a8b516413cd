"""What the trainer counts between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from kvpref.data import StepBatcher
from kvpref.data.batching.steps import MicroBatch
from kvpref.models.partitioned import num_values
from kvpref.parallel.gathering import gather
from kvpref.plan.batch import Batch


class MetricMeter:
    """Weighted means of a loss's metrics; sums stay on the device until they are read.

    A metric that a micro-batch lacks is a mean over the other micro-batches.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: dict[str, torch.Tensor], weight: float) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double() * weight
            self._weights[name] = self._weights.get(name, 0) + weight

    def pop(self, world_size: int) -> dict[str, float]:
        """The means over all ranks since the last call, without metrics of total weight 0."""
        values = _read(self._sums)
        own = {name: (values[name], self._weights[name]) for name in self._sums}
        self._sums, self._weights = {}, {}
        ranks = gather(own, world_size)
        names = sorted({name for rank in ranks for name in rank}) if world_size > 1 else list(own)
        totals = {
            name: [sum(column) for column in zip(*(r[name] for r in ranks if name in r), strict=True)] for name in names
        }
        return {name: total / weight for name, (total, weight) in totals.items() if weight}


def _read(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """The values of () tensors, in one copy from each device."""
    values: dict[str, float] = {}
    for device in {value.device for value in sums.values()}:
        names = [name for name, value in sums.items() if value.device == device]
        values.update(zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True))
    return values


class _Counts(NamedTuple):
    """What one rank, or all ranks together, trained."""

    num_groups: float = 0
    num_unique_tokens: float = 0
    num_total_tokens: float = 0
    num_forward_tokens: float = 0


class TokenMeter:
    """Groups and tokens trained, and how fast.

    Args:
        ranks_per_group: Ranks that train each group together and each count it.

    Attributes:
        num_groups: Groups that this rank trained.
        num_unique_tokens: Tokens stored and computed once per prefix tree.
        num_total_tokens: Tokens of all sequences, shared prompts once per sequence.
        num_forward_tokens: Tokens that ran through the layers in the current mode, padding included; tokens that the
            bounded schedule runs twice count once.
    """

    def __init__(self, ranks_per_group: int = 1) -> None:
        self._ranks_per_group = ranks_per_group
        self.num_groups = 0
        self.num_unique_tokens = 0
        self.num_total_tokens = 0
        self.num_forward_tokens = 0
        self._seconds = 0.0
        self._started: float | None = None
        # Counts of all ranks, and of this one, when last gathered.
        self._gathered, self._own_then, self._seconds_then = _Counts(), _Counts(), 0.0

    def start(self) -> None:
        """Start the clock, which excludes evaluation and saving."""
        self._started = time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`."""
        if self._started is None:
            return 0.0
        seconds = time.perf_counter() - self._started
        self._seconds += seconds
        self._started = None
        return seconds

    def add(self, batch: Batch, num_unique_tokens: int, num_forward_tokens: int) -> None:
        self.num_groups += batch.num_groups
        self.num_unique_tokens += num_unique_tokens
        self.num_total_tokens += batch.num_total_tokens
        self.num_forward_tokens += num_forward_tokens

    @property
    def token_saving(self) -> float:
        """The saving of the run; see `kvpref.data.statistics.TOKEN_SAVING`. Below 1 if padding outweighs sharing."""
        counts = self._of_run(self._ranks_per_group)
        return counts.num_total_tokens / max(1, counts.num_forward_tokens)

    def gather(self, world_size: int) -> None:
        """Collect the counts of all ranks. All ranks have to call it."""
        self._own_then = self._own()
        ranks = gather((self._own_then, self._seconds), world_size)
        columns = zip(*(own for own, _ in ranks), strict=True)
        self._gathered = _Counts(*(sum(column) / self._ranks_per_group for column in columns))
        self._seconds_then = max(seconds for _, seconds in ranks) - self._seconds

    def rates(self, world_size: int) -> dict[str, float]:
        """Throughput over all ranks, per second of training.

        What was trained since `gather` is estimated from this rank.
        """
        counts = self._of_run(world_size)
        seconds = max(self._seconds + self._seconds_then, 1e-9)
        return {
            "groups_per_second": counts.num_groups / seconds,
            "unique_tokens_per_second": counts.num_unique_tokens / seconds,
            "token_saving": counts.num_total_tokens / max(1, counts.num_forward_tokens),
        }

    def _own(self) -> _Counts:
        return _Counts(self.num_groups, self.num_unique_tokens, self.num_total_tokens, self.num_forward_tokens)

    def _of_run(self, world_size: int) -> _Counts:
        num_counts = world_size / self._ranks_per_group
        columns = zip(self._gathered, self._own(), self._own_then, strict=True)
        return _Counts(*(gathered + (own - then) * num_counts for gathered, own, then in columns))


class WorkMeter:
    """How unevenly work is spread over ranks.

    Ranks wait for one another inside their passes, so no clock can tell work from waiting; work is counted by the cost
    model that plans are balanced by.

    Args:
        batcher: Plans the steps.
    """

    def __init__(self, batcher: StepBatcher) -> None:
        self._batcher = batcher
        self._steps: list[tuple[float, float]] = []

    def add(self, micro_batches: Iterable[MicroBatch], seconds: float) -> None:
        """Count a step of this rank and its duration."""
        self._steps.append((sum(map(self._batcher.micro_batch_cost, micro_batches)), seconds))

    def pop(self, world_size: int) -> dict[str, float]:
        """Over all steps since the last call; empty if there is only one rank.

        ``rank_imbalance`` is the work of each step's busiest rank over the mean of all ranks; ``idle_seconds`` is how
        long a rank waited for it, on average.
        """
        own, self._steps = self._steps, []
        if world_size == 1:
            return {}
        most = mean = idle = 0.0
        for step in zip(*gather(own, world_size), strict=True):
            works = [work for work, _ in step]
            seconds = max(seconds for _, seconds in step)
            most += max(works)
            mean += sum(works) / world_size
            idle += seconds * (1 - sum(works) / world_size / max(works))
        return {"rank_imbalance": most / mean, "idle_seconds": idle} if mean else {}


def linear_flops(model: nn.Module, num_tokens: int) -> int:
    """Training FLOPs of linear layers: 6 per parameter and token."""
    return 6 * num_tokens * sum(map(num_values, model.parameters()))
