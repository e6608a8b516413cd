"""Which groups make up each optimizer step, and how a step is cut into micro-batches for the ranks.

Pure Python numbers. Everything follows from the lengths, the clusters, the options, the cost model and the epoch, so
every rank computes the same plan without communication, and a run resumes by skipping finished steps.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

from kvpref.data.batching.balancing import balance
from kvpref.data.batching.costs import COUNTS, CostModel, Mode
from kvpref.data.batching.cutting import cut_by_cost, cut_by_length, cut_together
from kvpref.data.batching.dealing import deal
from kvpref.data.batching.group_costs import WAITS, GroupCosts, Runs, Waits
from kvpref.data.batching.lengths import GroupLengths
from kvpref.data.batching.sharing import Clusters
from kvpref.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How groups are put into steps and micro-batches."""

    groups_per_step: int
    """Groups per optimizer step, over all ranks. The last step of an epoch may have fewer."""

    max_tokens_per_micro_batch: int | None = None
    """Upper bound on a micro-batch's tokens, padding included if the mode pads; None for no bound."""

    takes_larger_groups: bool = False
    """True if memory is bounded in another way, as by the chunks of schedule ``bounded``: a group that exceeds the
    bound becomes its own micro-batch. Whole groups stay together, because losses compare their sequences."""

    mode: Mode = "two_pass"
    """Which tokens count: unique ones (two_pass, one_pass), all (packed), or all plus padding (padded)."""

    world_size: int = 1
    """Number of ranks; each gets the same number of micro-batches, because collective operations must match."""

    waits: Waits = "micro_batch"
    """Where ranks wait for one another: at each ``pass`` or ``micro_batch``, or at the end of the ``step``; see
    `kvpref.data.batching.dealing`."""

    seed: int = 0
    """Seed of the order."""

    shuffle: bool = True
    """False keeps the order of the data, apart from the sorting inside windows and clusters (for evaluation)."""

    window_steps: int = 16
    """Groups of similar length are gathered within the groups of this many steps: more means less padding and fuller
    micro-batches, fewer a more random order."""

    def __post_init__(self) -> None:
        for name in ("groups_per_step", "max_tokens_per_micro_batch", "world_size", "window_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1; got {value}")
        if self.mode not in COUNTS:
            raise InputError(f"mode must be one of {', '.join(COUNTS)}; got {self.mode!r}")
        if self.waits not in WAITS:
            raise InputError(f"waits must be one of {', '.join(WAITS)}; got {self.waits!r}")


class MicroBatch(NamedTuple):
    """The groups of one forward and backward pass."""

    group_indices: tuple[int, ...]
    """Indices into the dataset, ordered by the length of each group's longest sequence."""

    is_filler: bool = False
    """True for a repeated group that only keeps the ranks in step: run it with weight 0."""


BatchedStep = tuple[tuple[MicroBatch, ...], ...]
"""One optimizer step: the micro-batches of each rank, costliest first, equally many on every rank."""


class StepBatcher:
    """Plans the steps of any epoch.

    The token budget bounds memory and so decides how many micro-batches a step has; the cost model decides which groups
    go together and to which rank, so that no rank waits long for another. Groups of a cluster are neighbours in one
    step, in every mode; a cluster is cut only if it exceeds a step or no room for it is left.

    Args:
        lengths: Counts per group.
        options: Sizes, limits and the order.
        group_ids: Names of the groups for error messages; their indices if None.
        cost_model: The cost of micro-batches, the same on every rank; tokens if None.
        clusters: Which groups begin alike, for the same number of groups per step; None keeps none together.

    Attributes:
        lengths: Counts per group.
        options: Sizes, limits and the order.
        clusters: Which groups begin alike, or None.
        costs: Tokens and cost of groups and micro-batches.

    Raises:
        InputError: If there are no groups, or a single group exceeds the budget and the options do not allow it.
        ValueError: If the clusters are for a different number of groups.
    """

    def __init__(
        self,
        lengths: Sequence[GroupLengths],
        options: StepOptions,
        group_ids: Sequence[str | None] | None = None,
        cost_model: CostModel | None = None,
        clusters: Clusters | None = None,
    ) -> None:
        if not lengths:
            raise InputError("there are no groups to plan steps for; load a dataset with at least one row")
        if clusters is not None and len(clusters.of_group) != len(lengths):
            raise ValueError(f"clusters cover {len(clusters.of_group)} groups; there are {len(lengths)}")
        self.clusters = clusters
        self.options = options
        self.lengths = lengths
        budget = options.max_tokens_per_micro_batch
        self.costs = GroupCosts(lengths, options.mode, cost_model or CostModel(), budget, clusters)
        if self.larger_groups and not options.takes_larger_groups:
            largest = max(self.larger_groups, key=lambda group: self.costs.run_tokens([group]))
            tokens = self.costs.run_tokens([largest])
            name = (group_ids[largest] if group_ids is not None else None) or f"group {largest}"
            raise InputError(
                f"{name}: the group alone takes {tokens} tokens in mode {options.mode}, and the budget "
                f"of a micro-batch is {budget}; raise max_tokens_per_micro_batch to {tokens} or more, train in "
                "schedule bounded, which cuts it into chunks, or lower max_prompt_tokens or max_response_tokens"
            )

    @cached_property
    def larger_groups(self) -> tuple[int, ...]:
        """The groups that exceed the budget by themselves."""
        budget = self.costs.budget
        return tuple(index for index in range(len(self.lengths)) if self.costs.run_tokens([index]) > budget)

    @property
    def num_steps(self) -> int:
        """Optimizer steps per epoch, the same in every epoch."""
        return -(-len(self.lengths) // self.options.groups_per_step)

    def steps(self, epoch: int = 0) -> list[BatchedStep]:
        """The steps of one epoch in order; apart from fillers, every group is in exactly one."""
        return [self._batch_step(groups) for groups in self._group_steps(epoch)]

    def micro_batch_tokens(self, micro_batch: MicroBatch) -> int:
        """Tokens that the model processes for a micro-batch, padding included if the mode pads."""
        return self.costs.run_tokens(micro_batch.group_indices)

    def micro_batch_cost(self, micro_batch: MicroBatch) -> float:
        """Cost of a micro-batch in the cost model's unit."""
        return self.costs.run_cost(micro_batch.group_indices)

    def micro_batch_lengths(self, micro_batch: MicroBatch) -> GroupLengths:
        """Combined counts of a micro-batch's groups."""
        return self.costs.run_lengths(micro_batch.group_indices)

    def cut(self, groups: Sequence[int]) -> Runs:
        """Cut one step's groups into micro-batches."""
        options = self.options
        if options.mode == "padded":
            return cut_by_length(groups, self.costs, options.world_size)
        rule = cut_by_cost if self.costs.clusters is None else cut_together
        return rule(groups, self.costs, options.world_size, options.waits)

    def _group_steps(self, epoch: int) -> list[list[int]]:
        """The groups of each step, the same in every mode."""
        options, num_groups = self.options, len(self.lengths)
        # A string seed is hashed with SHA-512, so it gives the same order on every machine and Python.
        generator = random.Random(f"kvpref steps {options.seed} {epoch}")
        units = self._units(generator)
        if options.shuffle:
            generator.shuffle(units)
        # The incomplete step is set aside before sorting, which would fill it with the longest groups.
        num_complete = num_groups - num_groups % options.groups_per_step
        windows = _split(num_complete, options.window_steps * options.groups_per_step)
        *parts, rest = _fill(units, [*windows, num_groups - num_complete])
        steps = []
        for size, part in zip(windows, parts, strict=True):
            # Sorted by a length independent of the mode, so that every mode trains on the same steps.
            part.sort(key=lambda unit: max(map(self._length, unit)))
            filled = _fill(part, _split(size, options.groups_per_step))
            steps += [list(chain.from_iterable(step)) for step in filled]
        if options.shuffle:
            generator.shuffle(steps)
        return [*steps, list(chain.from_iterable(rest))] if rest else steps

    def _units(self, generator: random.Random) -> Runs:
        """Groups to keep together: clusters (in parts if larger than a step) and single groups."""
        if self.clusters is None:
            return [[group] for group in range(len(self.lengths))]
        members: dict[int, list[int]] = {}
        for group, cluster in enumerate(self.clusters.of_group):
            members.setdefault(cluster, []).append(group)
        units: Runs = []
        for own in members.values():
            most = self.options.groups_per_step
            if len(own) > most and self.options.shuffle:
                # So that each epoch cuts it differently.
                generator.shuffle(own)
            units += [own[start : start + most] for start in range(0, len(own), most)]
        return units

    def _length(self, group: int) -> int:
        return self.lengths[group].max_sequence_tokens

    def _batch_step(self, groups: list[int]) -> BatchedStep:
        runs = self.cut(groups)
        ranks = self._balanced(deal(runs, self.costs, self.options.world_size))
        planned = [[MicroBatch(tuple(sorted(run, key=self._length))) for run in rank] for rank in ranks]
        if len(runs) % self.options.world_size:
            # Only if there are fewer groups than places; repeating the cheapest group wastes the least.
            filler = MicroBatch((min(groups, key=self.costs.costs.__getitem__),), is_filler=True)
            most = max(map(len, planned))
            planned = [[*rank, *[filler] * (most - len(rank))] for rank in planned]
        return tuple(map(tuple, planned))

    def _balanced(self, ranks: list[Runs]) -> list[Runs]:
        """The same groups, arranged so that ranks wait less; if places are left over, every group is alone already."""
        if self.options.mode == "padded" or len({len(rank) for rank in ranks}) > 1:
            return ranks
        ranks = balance(ranks, self.costs, self.options.waits)
        if self.options.waits != "step":
            # New rounds: the cheapest of one may now be cheaper than the costliest of the next.
            return deal([run for rank in ranks for run in rank], self.costs, self.options.world_size)
        return [sorted(rank, key=self.costs.run_cost, reverse=True) for rank in ranks]


def _split(number: int, size: int) -> list[int]:
    """A number as multiples of `size` and a remainder."""
    return [min(size, number - start) for start in range(0, number, size)]


def _fill(units: Runs, sizes: Sequence[int]) -> list[Runs]:
    """Put units into bins of the given sizes, which together hold all groups.

    Each unit of several groups, largest first, goes to the bin with room that is nearest to where the order alone
    would put it, and is cut only if no bin has room for it; single groups fill the rest, in order.
    """
    rooms, ends = list(sizes), list(accumulate(sizes))
    starts = [0, *accumulate(map(len, units))]
    filled: list[list[tuple[int, list[int]]]] = [[] for _ in sizes]

    def put(index: int, unit: list[int], position: int) -> None:
        filled[index].append((position, unit))
        rooms[index] -= len(unit)

    several = [position for position, unit in enumerate(units) if len(unit) > 1]
    for position in sorted(several, key=lambda position: -len(units[position])):
        unit, wanted = units[position], bisect_right(ends, starts[position])
        while unit:
            index = _nearest(rooms, wanted, len(unit))
            if index is None:
                index = max(range(len(rooms)), key=rooms.__getitem__)
            part, unit = unit[: rooms[index]], unit[rooms[index] :]
            put(index, part, position)
    index = 0
    for position, unit in enumerate(units):
        if len(unit) == 1:
            while not rooms[index]:
                index += 1
            put(index, unit, position)
    return [[unit for _, unit in sorted(place)] for place in filled]


def _nearest(rooms: Sequence[int], wanted: int, size: int) -> int | None:
    """The bin nearest to `wanted` with room for `size` groups, the earlier of two; None if there is none."""
    for distance in range(len(rooms)):
        for index in (wanted - distance, wanted + distance):
            if 0 <= index < len(rooms) and rooms[index] >= size:
                return index
    return None
