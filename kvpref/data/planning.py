"""Which groups make up each optimizer step, and how a step is cut into micro-batches for the ranks.

Pure integers. Everything follows from the lengths, the options and the epoch, so every rank plans alike without
communication, and a run resumes by skipping the steps that it has done.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Literal, NamedTuple

from kvpref.data.lengths import GroupLengths
from kvpref.errors import InputError

Mode = Literal["two_pass", "one_pass", "packed", "padded"]

COSTS: dict[str, Callable[[GroupLengths], int]] = {
    "two_pass": lambda lengths: lengths.unique_tokens,
    "one_pass": lambda lengths: lengths.unique_tokens,
    "packed": lambda lengths: lengths.total_tokens,
    "padded": lambda lengths: lengths.max_sequence_tokens * lengths.num_sequences,
}
"""Tokens that the model processes for a micro-batch, per mode, given the micro-batch's lengths taken together."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How groups are put into steps and micro-batches."""

    groups_per_step: int
    """Groups per optimizer step, over all ranks. The last step of an epoch may have fewer."""

    max_tokens_per_micro_batch: int | None = None
    """Upper bound of a micro-batch's cost in tokens (see `COSTS`). None puts no bound."""

    mode: Mode = "two_pass"
    """Which tokens count: unique ones (two_pass, one_pass), all (packed), or all and padding (padded)."""

    world_size: int = 1
    """Number of ranks; each gets the same number of micro-batches, because collective operations must match."""

    seed: int = 0
    """Seed of the order."""

    shuffle: bool = True
    """False keeps the order of the data, apart from the sorting inside windows (for evaluation)."""

    window_steps: int = 16
    """Groups of about equal length are looked for within so many steps' groups: more gives less padding and fuller
    micro-batches, fewer gives a more random order."""

    def __post_init__(self) -> None:
        for name in ("groups_per_step", "max_tokens_per_micro_batch", "world_size", "window_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1; got {value}")
        if self.mode not in COSTS:
            raise InputError(f"mode must be one of {', '.join(COSTS)}; got {self.mode!r}")


class MicroBatch(NamedTuple):
    """The groups of one forward and backward pass."""

    group_indices: tuple[int, ...]
    """Indices into the dataset, shortest group first."""

    is_filler: bool = False
    """True for a repeated group that only keeps the ranks in step: run it with weight 0."""


StepPlan = tuple[tuple[MicroBatch, ...], ...]
"""One optimizer step: per rank its micro-batches, the most costly first, the same number on every rank."""


class StepPlanner:
    """Plans the steps of any epoch.

    Args:
        lengths: Token counts per group.
        options: Sizes, limits and the order.
        group_ids: Names of the groups for error messages; their indices if None.

    Attributes:
        lengths: Token counts per group.
        options: Sizes, limits and the order.

    Raises:
        InputError: If there are no groups, or a single group exceeds the budget.
    """

    def __init__(
        self,
        lengths: Sequence[GroupLengths],
        options: StepOptions,
        group_ids: Sequence[str | None] | None = None,
    ) -> None:
        if not lengths:
            raise InputError("there are no groups to plan steps for; load a data set with at least one row")
        self.options = options
        self.lengths = lengths
        self._cost = COSTS[options.mode]
        self._costs = [self._cost(group) for group in lengths]
        budget = options.max_tokens_per_micro_batch
        largest = max(range(len(lengths)), key=self._costs.__getitem__)
        if budget is not None and self._costs[largest] > budget:
            name = (group_ids[largest] if group_ids is not None else None) or f"group {largest}"
            raise InputError(
                f"{name}: the group alone takes {self._costs[largest]} tokens in mode {options.mode}, and the budget "
                f"of a micro-batch is {budget}; raise max_tokens_per_micro_batch to {self._costs[largest]} or more, or "
                "lower max_prompt_tokens or max_response_tokens"
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps per epoch, the same in every epoch."""
        return -(-len(self.lengths) // self.options.groups_per_step)

    def steps(self, epoch: int = 0) -> list[StepPlan]:
        """The steps of one epoch in order; every group is in exactly one, fillers aside."""
        return [self._plan_step(groups) for groups in self._group_steps(epoch)]

    def micro_batch_cost(self, micro_batch: MicroBatch) -> int:
        """Tokens that the model processes for a micro-batch, padding included where the mode pads."""
        return self._cost_of(micro_batch.group_indices)

    def micro_batch_lengths(self, micro_batch: MicroBatch) -> GroupLengths:
        """Token counts of a micro-batch's groups together."""
        return self._combine(micro_batch.group_indices)

    def _group_steps(self, epoch: int) -> list[list[int]]:
        """Groups of each step, the same in every mode."""
        options = self.options
        order = list(range(len(self.lengths)))
        # A string seed goes through SHA-512, so it gives the same order on every machine and Python.
        generator = random.Random(f"kvpref steps {options.seed} {epoch}")
        if options.shuffle:
            generator.shuffle(order)
        # The incomplete step is taken out before the sorting, which would fill it with the longest groups.
        num_complete = len(order) - len(order) % options.groups_per_step
        window = options.window_steps * options.groups_per_step
        steps = []
        for start in range(0, num_complete, window):
            # Sorted by a length that does not depend on the mode, so that every mode trains on the same steps.
            groups = sorted(
                order[start : min(start + window, num_complete)], key=lambda i: self.lengths[i].max_sequence_tokens
            )
            steps += [groups[i : i + options.groups_per_step] for i in range(0, len(groups), options.groups_per_step)]
        if options.shuffle:
            generator.shuffle(steps)
        if num_complete < len(order):
            steps.append(order[num_complete:])
        return steps

    def _sort(self, groups: list[int]) -> list[int]:
        # Padding depends on the longest sequence of a group; elsewhere the group's cost is its length.
        if self.options.mode == "padded":
            return sorted(groups, key=lambda index: self.lengths[index].max_sequence_tokens)
        return sorted(groups, key=self._costs.__getitem__)

    def _plan_step(self, groups: list[int]) -> StepPlan:
        world_size = self.options.world_size
        runs = self._split_to_multiple(self._cut_by_budget(self._sort(groups)), world_size)
        micro_batches = [MicroBatch(tuple(run)) for run in sorted(runs, key=self._cost_of, reverse=True)]
        # Only with fewer groups than places; the cheapest group wastes the least.
        cheapest = min(groups, key=self._costs.__getitem__)
        micro_batches += [MicroBatch((cheapest,), is_filler=True)] * (-len(micro_batches) % world_size)
        ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
        loads = [0] * world_size
        # Ranks wait for one another at each micro-batch, so those of one round should cost about the same; inside
        # a round the costliest goes to the rank that has done the least.
        for start in range(0, len(micro_batches), world_size):
            by_load = sorted(range(world_size), key=loads.__getitem__)
            for rank, micro_batch in zip(by_load, micro_batches[start : start + world_size], strict=True):
                ranks[rank].append(micro_batch)
                loads[rank] += self.micro_batch_cost(micro_batch)
        return tuple(map(tuple, ranks))

    def _cut_by_budget(self, groups: list[int]) -> list[list[int]]:
        budget = self.options.max_tokens_per_micro_batch
        if budget is None:
            return [groups]
        runs: list[list[int]] = []
        lengths = self.lengths[groups[0]]
        for group in groups:
            lengths = _add(lengths, self.lengths[group])
            if runs and self._cost(lengths) <= budget:
                runs[-1].append(group)
            else:
                runs.append([group])
                lengths = self.lengths[group]
        return runs

    def _split_to_multiple(self, runs: list[list[int]], world_size: int) -> list[list[int]]:
        """Halve the most costly runs until their number is a multiple of the world size, or none can be halved."""
        runs = list(runs)
        while len(runs) % world_size:
            divisible = [index for index, run in enumerate(runs) if len(run) > 1]
            if not divisible:
                break
            index = max(divisible, key=lambda index: self._cost_of(runs[index]))
            runs[index : index + 1] = self._halve(runs[index])
        return runs

    def _halve(self, run: list[int]) -> list[list[int]]:
        """Cut a run where the costlier part costs least."""
        lengths = [self.lengths[group] for group in run]
        before = [self._cost(part) for part in accumulate(lengths, _add)]
        after = [self._cost(part) for part in accumulate(reversed(lengths), _add)][::-1]
        at = min(range(1, len(run)), key=lambda cut: max(before[cut - 1], after[cut]))
        return [run[:at], run[at:]]

    def _cost_of(self, groups: Sequence[int]) -> int:
        return self._cost(self._combine(groups))

    def _combine(self, groups: Sequence[int]) -> GroupLengths:
        return reduce(_add, (self.lengths[group] for group in groups))


def _add(first: GroupLengths, second: GroupLengths) -> GroupLengths:
    return GroupLengths(
        first.unique_tokens + second.unique_tokens,
        first.total_tokens + second.total_tokens,
        max(first.max_sequence_tokens, second.max_sequence_tokens),
        first.num_sequences + second.num_sequences,
    )
