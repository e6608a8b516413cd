"""Which groups make up each optimizer step, and how a step is cut into micro-batches for the ranks.

Pure Python numbers. Everything follows from the lengths, the clusters, the options, the cost model and the epoch, so
every rank finds the same without communication, and a run resumes by skipping the steps that it has done.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

from kvpref.data.batching.costs import COUNTS, CostModel, Mode
from kvpref.data.batching.cutting import GroupCosts, Runs, cut_by_cost, cut_by_length, cut_together
from kvpref.data.batching.lengths import GroupLengths
from kvpref.data.batching.sharing import Clusters
from kvpref.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How groups are put into steps and micro-batches."""

    groups_per_step: int
    """Groups per optimizer step, over all ranks. The last step of an epoch may have fewer."""

    max_tokens_per_micro_batch: int | None = None
    """Upper bound of a micro-batch's tokens, padding included where the mode pads. None puts no bound."""

    mode: Mode = "two_pass"
    """Which tokens count: unique ones (two_pass, one_pass), all (packed), or all and padding (padded)."""

    world_size: int = 1
    """Number of ranks; each gets the same number of micro-batches, because collective operations must match."""

    seed: int = 0
    """Seed of the order."""

    shuffle: bool = True
    """False keeps the order of the data, apart from the sorting inside windows and clusters (for evaluation)."""

    window_steps: int = 16
    """Groups of about equal length are looked for within so many steps' groups: more gives less padding and fuller
    micro-batches, fewer gives a more random order."""

    def __post_init__(self) -> None:
        for name in ("groups_per_step", "max_tokens_per_micro_batch", "world_size", "window_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1; got {value}")
        if self.mode not in COUNTS:
            raise InputError(f"mode must be one of {', '.join(COUNTS)}; got {self.mode!r}")


class MicroBatch(NamedTuple):
    """The groups of one forward and backward pass."""

    group_indices: tuple[int, ...]
    """Indices into the dataset, the group with the shortest longest sequence first."""

    is_filler: bool = False
    """True for a repeated group that only keeps the ranks in step: run it with weight 0."""


BatchedStep = tuple[tuple[MicroBatch, ...], ...]
"""One optimizer step: per rank its micro-batches, the most costly first, the same number on every rank."""


class StepBatcher:
    """Plans the steps of any epoch.

    The token budget bounds memory and so decides how many micro-batches a step has; the cost model decides which groups
    go together and to which rank, so that no rank waits long for another. Groups of a cluster come into one step, next
    to one another, in every mode; a cluster is cut only if it exceeds a step or no place for it is left.

    Args:
        lengths: Counts per group.
        options: Sizes, limits and the order.
        group_ids: Names of the groups for error messages; their indices if None.
        cost_model: What micro-batches cost, the same on every rank; tokens if None.
        clusters: Which groups begin alike, for as many groups per step; None keeps none together.

    Attributes:
        lengths: Counts per group.
        options: Sizes, limits and the order.
        clusters: Which groups begin alike, or None.
        costs: Tokens and cost of groups and micro-batches.

    Raises:
        InputError: If there are no groups, or a single group exceeds the budget.
        ValueError: If the clusters are those of another number of groups.
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
            raise InputError("there are no groups to plan steps for; load a data set with at least one row")
        if clusters is not None and len(clusters.of_group) != len(lengths):
            raise ValueError(f"clusters are of {len(clusters.of_group)} groups; there are {len(lengths)}")
        self.clusters = clusters
        self.options = options
        self.lengths = lengths
        budget = options.max_tokens_per_micro_batch
        self.costs = GroupCosts(lengths, options.mode, cost_model or CostModel(), budget, clusters)
        tokens = self.costs.tokens
        largest = max(range(len(lengths)), key=tokens.__getitem__)
        if budget is not None and tokens[largest] > budget:
            name = (group_ids[largest] if group_ids is not None else None) or f"group {largest}"
            raise InputError(
                f"{name}: the group alone takes {tokens[largest]} tokens in mode {options.mode}, and the budget "
                f"of a micro-batch is {budget}; raise max_tokens_per_micro_batch to {tokens[largest]} or more, or "
                "lower max_prompt_tokens or max_response_tokens"
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps per epoch, the same in every epoch."""
        return -(-len(self.lengths) // self.options.groups_per_step)

    def steps(self, epoch: int = 0) -> list[BatchedStep]:
        """The steps of one epoch in order; every group is in exactly one, fillers aside."""
        return [self._batch_step(groups) for groups in self._group_steps(epoch)]

    def micro_batch_tokens(self, micro_batch: MicroBatch) -> int:
        """Tokens that the model processes for a micro-batch, padding included where the mode pads."""
        return self.costs.run_tokens(micro_batch.group_indices)

    def micro_batch_cost(self, micro_batch: MicroBatch) -> float:
        """Cost of a micro-batch in the cost model's unit."""
        return self.costs.run_cost(micro_batch.group_indices)

    def micro_batch_lengths(self, micro_batch: MicroBatch) -> GroupLengths:
        """Counts of a micro-batch's groups together."""
        return self.costs.run_lengths(micro_batch.group_indices)

    def cut(self, groups: Sequence[int]) -> Runs:
        """Cut one step's groups into micro-batches."""
        rule = cut_by_length if self.options.mode == "padded" else cut_by_cost
        if self.costs.clusters is not None:
            rule = cut_together
        return rule(groups, self.costs, self.options.world_size)

    def _group_steps(self, epoch: int) -> list[list[int]]:
        """Groups of each step, the same in every mode."""
        options, num_groups = self.options, len(self.lengths)
        # A string seed goes through SHA-512, so it gives the same order on every machine and Python.
        generator = random.Random(f"kvpref steps {options.seed} {epoch}")
        units = self._units(generator)
        if options.shuffle:
            generator.shuffle(units)
        # The incomplete step is taken out before the sorting, which would fill it with the longest groups.
        num_complete = num_groups - num_groups % options.groups_per_step
        windows = _split(num_complete, options.window_steps * options.groups_per_step)
        *parts, rest = _fill(units, [*windows, num_groups - num_complete])
        steps = []
        for size, part in zip(windows, parts, strict=True):
            # Sorted by a length that does not depend on the mode, so that every mode trains on the same steps.
            part.sort(key=lambda unit: max(map(self._length, unit)))
            filled = _fill(part, _split(size, options.groups_per_step))
            steps += [list(chain.from_iterable(step)) for step in filled]
        if options.shuffle:
            generator.shuffle(steps)
        return [*steps, list(chain.from_iterable(rest))] if rest else steps

    def _units(self, generator: random.Random) -> Runs:
        """Groups to keep together: clusters, those larger than a step in parts, and groups that are alone."""
        if self.clusters is None:
            return [[group] for group in range(len(self.lengths))]
        members: dict[int, list[int]] = {}
        for group, cluster in enumerate(self.clusters.of_group):
            members.setdefault(cluster, []).append(group)
        units: Runs = []
        for own in members.values():
            most = self.options.groups_per_step
            if len(own) > most and self.options.shuffle:
                # So that an epoch cuts it otherwise than the one before.
                generator.shuffle(own)
            units += [own[start : start + most] for start in range(0, len(own), most)]
        return units

    def _length(self, group: int) -> int:
        return self.lengths[group].max_sequence_tokens

    def _batch_step(self, groups: list[int]) -> BatchedStep:
        world_size = self.options.world_size
        costed = sorted(((self.costs.run_cost(run), run) for run in self.cut(groups)), reverse=True)
        micro_batches = [(cost, MicroBatch(tuple(sorted(run, key=self._length)))) for cost, run in costed]
        if len(micro_batches) % world_size:
            # Only with fewer groups than places; the cheapest group wastes the least.
            cheapest = [min(groups, key=self.costs.costs.__getitem__)]
            filler = (self.costs.run_cost(cheapest), MicroBatch(tuple(cheapest), is_filler=True))
            micro_batches += [filler] * (-len(micro_batches) % world_size)
        ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
        loads = [0.0] * world_size
        # FSDP makes ranks wait for one another at each micro-batch, DDP at the step's end. So those of one round cost
        # about the same, and inside a round the costliest goes to the rank that has done the least.
        for start in range(0, len(micro_batches), world_size):
            by_load = sorted(range(world_size), key=loads.__getitem__)
            for rank, (cost, micro_batch) in zip(by_load, micro_batches[start : start + world_size], strict=True):
                ranks[rank].append(micro_batch)
                loads[rank] += cost
        return tuple(map(tuple, ranks))


def _split(number: int, size: int) -> list[int]:
    """A number as so many times `size` and what remains."""
    return [min(size, number - start) for start in range(0, number, size)]


def _fill(units: Runs, sizes: Sequence[int]) -> list[Runs]:
    """Put units into bins for so many groups, in all as many as there are.

    Each unit of several groups, the largest first, goes to the bin with room that is nearest to where the order alone
    would put it, and is cut only where none has room for it; single groups fill up what is left, in order.
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
    """The bin nearest to the wanted one with room for so many groups, the earlier of two; None if there is none."""
    for distance in range(len(rooms)):
        for index in (wanted - distance, wanted + distance):
            if 0 <= index < len(rooms) and rooms[index] >= size:
                return index
    return None
