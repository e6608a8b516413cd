"""What the trainer counts between two log lines."""

from __future__ import annotations

import time

import torch

from kvpref.plan.batch import Batch


class MetricMeter:
    """Weighted means of a loss's metrics; sums stay on the device until they are read.

    A metric that a micro-batch does not have (nothing in it is of that kind) is a mean over the others.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, int] = {}

    def add(self, metrics: dict[str, torch.Tensor], weight: int) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double() * weight
            self._weights[name] = self._weights.get(name, 0) + weight

    def pop(self, world_size: int) -> dict[str, float]:
        """The means over all ranks since the last call; none of a metric that nothing counted for."""
        values = _read(self._sums)
        own = {name: (values[name], self._weights[name]) for name in self._sums}
        self._sums, self._weights = {}, {}
        ranks = [own]
        if world_size > 1:
            ranks = [{}] * world_size
            torch.distributed.all_gather_object(ranks, own)
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


class TokenMeter:
    """Groups and tokens trained, and how fast; counts of this rank times the number of ranks are the run's.

    Attributes:
        num_groups: Groups trained.
        num_unique_tokens: Tokens stored and computed once per prefix tree.
        num_total_tokens: Tokens of all sequences, shared prompts once per sequence.
        num_forward_tokens: Tokens that ran through the layers in the mode at hand, padding included; those that the
            bounded schedule runs twice count once.
    """

    def __init__(self) -> None:
        self.num_groups = 0
        self.num_unique_tokens = 0
        self.num_total_tokens = 0
        self.num_forward_tokens = 0
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Time runs from here; evaluation and saving are not counted."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def add(self, batch: Batch, num_forward_tokens: int) -> None:
        self.num_groups += batch.num_groups
        self.num_unique_tokens += batch.num_unique_tokens
        self.num_total_tokens += batch.num_total_tokens
        self.num_forward_tokens += num_forward_tokens

    @property
    def token_saving(self) -> float:
        """See `kvpref.data.statistics.TOKEN_SAVING`; below 1 where padding outweighs what is shared."""
        return self.num_total_tokens / max(1, self.num_forward_tokens)

    def rates(self, world_size: int) -> dict[str, float]:
        """Throughput over all ranks, per second of training."""
        seconds = max(self._seconds, 1e-9)
        return {
            "groups_per_second": self.num_groups * world_size / seconds,
            "unique_tokens_per_second": self.num_unique_tokens * world_size / seconds,
            "token_saving": self.token_saving,
        }
