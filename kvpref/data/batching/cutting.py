"""How the groups of one optimizer step are cut into micro-batches that keep the token budget and cost about the same.

Two rules, because padding couples groups. Where nothing is padded, tokens and cost of a micro-batch are sums over its
groups, so any groups may go together and `cut_by_cost` evens the costs out. In mode ``padded`` a group is padded to the
longest of its micro-batch, so `cut_by_length` keeps groups of like length together. Where prompts are encoded once,
`cut_together` also keeps groups together that begin alike.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate
from math import inf

from kvpref.data.batching.costs import COUNTS, SHARING_MODES, CostModel, Mode
from kvpref.data.batching.lengths import GroupLengths, combine, combine_sharing
from kvpref.data.batching.sharing import Clusters

Runs = list[list[int]]
"""Micro-batches of one step: indices of groups."""

_BISECTIONS = 12
"""Halvings of the interval in which the smallest possible cost of the costliest run lies."""


class GroupCosts:
    """Tokens and cost of any set of groups.

    Args:
        lengths: Counts per group.
        mode: What the model computes for them.
        cost_model: What that costs.
        budget: Most tokens of a micro-batch; None for no bound.
        clusters: Which groups begin alike, which counts in modes that encode prompts once; None for no groups.

    Attributes:
        lengths: Counts per group.
        mode: What the model computes for them.
        cost_model: What counts cost.
        budget: Most tokens of a micro-batch, infinite without a bound.
        tokens: Tokens of each group alone.
        costs: Cost of each group alone, without what every micro-batch costs.
        clusters: Which groups begin alike; None where that does not matter.
    """

    def __init__(
        self,
        lengths: Sequence[GroupLengths],
        mode: Mode,
        cost_model: CostModel,
        budget: float | None = None,
        clusters: Clusters | None = None,
    ) -> None:
        self.lengths = lengths
        self.mode = mode
        self.cost_model = cost_model
        self.budget = inf if budget is None else budget
        self.clusters = clusters if mode in SHARING_MODES else None
        self._counts = COUNTS[mode]
        counts = [self._counts(group) for group in lengths]
        self.tokens = [group[0] for group in counts]
        self.costs = [cost_model.cost(group) - cost_model.per_micro_batch for group in counts]

    def run_tokens(self, run: Sequence[int]) -> int:
        """Tokens that the model processes for a micro-batch of these groups, padding included."""
        return self._counts(self.run_lengths(run))[0]

    def run_cost(self, run: Sequence[int]) -> float:
        """Cost of a micro-batch of these groups, in the cost model's unit."""
        return self.cost(self.run_lengths(run))

    def cost(self, lengths: GroupLengths) -> float:
        """Cost of a micro-batch of these counts, in the cost model's unit."""
        return self.cost_model.cost(self._counts(lengths))

    def run_lengths(self, run: Sequence[int]) -> GroupLengths:
        """Counts of these groups together: what groups of a cluster begin with is encoded once."""
        if self.clusters is None:
            return combine([self.lengths[group] for group in run])
        members: dict[int, list[GroupLengths]] = {}
        for group in run:
            members.setdefault(self.clusters.of_group[group], []).append(self.lengths[group])
        shared, shortest = self.clusters.shared_tokens, self.clusters.min_shared_tokens
        return combine([combine_sharing(own, shared[cluster], shortest) for cluster, own in members.items()])


def cut_by_cost(groups: Sequence[int], costs: GroupCosts, world_size: int) -> Runs:
    """Cut groups so that micro-batches cost about the same; for modes whose counts add up over groups.

    As few micro-batches as two heuristics find room for: the costliest group first, each to the cheapest micro-batch
    with room (Graham 1969, "Bounds on multiprocessing timing anomalies"), which evens costs out; where that finds no
    room in so few, best fit decreasing (Johnson 1974, "Fast algorithms for bin packing"), which packs more tightly.

    Args:
        groups: Indices of a step's groups, each within the budget.
        costs: Of all groups.
        world_size: The number of micro-batches is a multiple of it, unless every group is alone.
    """
    packed = _best_fit(groups, costs)
    fewest = max(1, int(-(-sum(costs.tokens[group] for group in groups) // costs.budget)))
    most = min(_round_up(len(packed), world_size), len(groups))
    for num_runs in range(_round_up(fewest, world_size), most + 1, world_size):
        runs = _costliest_first(groups, costs, num_runs)
        if runs is not None:
            return runs
    return halve_to_multiple(packed, costs, world_size)


def waiting_cost(runs: Runs, costs: GroupCosts, world_size: int) -> float:
    """What a step costs where ranks wait for one another at every micro-batch: of each round the costliest.

    Runs of about equal cost make up a round; see `StepBatcher`.
    """
    return sum(sorted(map(costs.run_cost, runs), reverse=True)[::world_size])


def cut_together(groups: Sequence[int], costs: GroupCosts, world_size: int) -> Runs:
    """Cut groups by cost, those of a cluster together where that costs no more; for modes that encode prompts once.

    Each cluster of the step, in parts as large as the budget allows, is first cut as if it were one group. Where ranks
    would wait longer for one another than it saves, every group is on its own.

    Args:
        groups: Indices of a step's groups, each within the budget, those of a cluster next to one another.
        costs: Of all groups.
        world_size: The number of micro-batches is a multiple of it, unless every group is alone.
    """
    apart = cut_by_cost(groups, costs, world_size)
    parts = _cluster_parts(groups, costs)
    if len(parts) == len(groups):
        return apart
    lengths = [costs.run_lengths(part) for part in parts]
    cut = cut_by_cost(range(len(parts)), GroupCosts(lengths, costs.mode, costs.cost_model, costs.budget), world_size)
    together = [[group for part in run for group in parts[part]] for run in cut]
    together = halve_to_multiple(together, costs, world_size)
    return min((together, apart), key=lambda runs: waiting_cost(runs, costs, world_size))


def cut_by_length(groups: Sequence[int], costs: GroupCosts, world_size: int) -> Runs:
    """Cut length-sorted groups into runs whose costliest is as cheap as the number of runs allows; for ``padded``.

    The number of runs is the fewest that the budget allows, rounded up to a multiple of `world_size`.

    Args:
        groups: Indices of a step's groups, each within the budget.
        costs: Of all groups.
        world_size: The number of micro-batches is a multiple of it, unless every group is alone.
    """
    ordered = sorted(groups, key=lambda group: costs.lengths[group].max_sequence_tokens)
    runs = _runs_up_to(ordered, costs, inf)
    num_runs = _round_up(len(runs), world_size)
    if num_runs >= len(ordered):
        return [[group] for group in ordered]
    fixed = costs.cost_model.per_micro_batch
    low = max(costs.costs[group] for group in ordered) + fixed
    high = max(map(costs.run_cost, runs))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        cheaper = _runs_up_to(ordered, costs, middle)
        if len(cheaper) <= num_runs:
            runs, high = cheaper, middle
        else:
            low = middle
    return halve_to_multiple(runs, costs, world_size)


def halve_to_multiple(runs: Runs, costs: GroupCosts, world_size: int) -> Runs:
    """Halve the costliest runs until their number is a multiple of the world size, or none can be halved."""
    runs = list(runs)
    while len(runs) % world_size:
        divisible = [index for index, run in enumerate(runs) if len(run) > 1]
        if not divisible:
            break
        index = max(divisible, key=lambda index: costs.run_cost(runs[index]))
        runs[index : index + 1] = _halve(runs[index], costs)
    return runs


def _halve(run: list[int], costs: GroupCosts) -> Runs:
    """Cut a run where the costlier part costs least."""
    lengths = [costs.lengths[group] for group in run]
    before = [costs.cost(part) for part in accumulate(lengths, _add)]
    after = [costs.cost(part) for part in accumulate(reversed(lengths), _add)][::-1]
    at = min(range(1, len(run)), key=lambda cut: max(before[cut - 1], after[cut]))
    return [run[:at], run[at:]]


def _cluster_parts(groups: Sequence[int], costs: GroupCosts) -> Runs:
    """Neighbours of one cluster that fit the budget together."""
    parts: Runs = []
    for group in groups:
        assert costs.clusters is not None
        cluster = costs.clusters.of_group[group]
        joins = bool(parts) and costs.clusters.of_group[parts[-1][0]] == cluster
        if joins and costs.run_tokens([*parts[-1], group]) <= costs.budget:
            parts[-1].append(group)
        else:
            parts.append([group])
    return parts


def _costliest_first(groups: Sequence[int], costs: GroupCosts, num_runs: int) -> Runs | None:
    """Each group, the costliest first, to the cheapest run with room; None where one finds no room."""
    runs: Runs = [[] for _ in range(num_runs)]
    room = [costs.budget] * num_runs
    # The number of groups breaks ties, so that none stays empty where groups cost nothing.
    cheapest_first = [(0.0, 0, index) for index in range(num_runs)]
    heapify(cheapest_first)
    for group in sorted(groups, key=costs.costs.__getitem__, reverse=True):
        full = []
        while cheapest_first and room[cheapest_first[0][2]] < costs.tokens[group]:
            full.append(heappop(cheapest_first))
        if not cheapest_first:
            return None
        load, count, index = heappop(cheapest_first)
        runs[index].append(group)
        room[index] -= costs.tokens[group]
        for entry in (*full, (load + costs.costs[group], count + 1, index)):
            heappush(cheapest_first, entry)
    return runs


def _best_fit(groups: Sequence[int], costs: GroupCosts) -> Runs:
    """Each group, the longest first, to the fullest run with room, or to a new one."""
    runs: Runs = []
    rooms: list[tuple[float, int]] = []  # sorted; what is left of the budget, and whose it is
    for group in sorted(groups, key=costs.tokens.__getitem__, reverse=True):
        fullest = bisect_left(rooms, (costs.tokens[group], -1))
        if fullest < len(rooms):
            room, index = rooms.pop(fullest)
            runs[index].append(group)
        else:
            room, index = costs.budget, len(runs)
            runs.append([group])
        insort(rooms, (room - costs.tokens[group], index))
    return runs


def _runs_up_to(ordered: Sequence[int], costs: GroupCosts, max_cost: float) -> Runs:
    """The fewest runs of padded, length-sorted groups that keep the budget and cost at most `max_cost` each.

    Filling each run as far as it goes gives the fewest, because a part of a run never takes more than the whole.
    """
    runs: Runs = []
    num_sequences = num_scored = 0
    for group in ordered:
        lengths = costs.lengths[group]
        width = lengths.max_sequence_tokens
        num_sequences += lengths.num_sequences
        num_scored += lengths.total_scored
        slots = num_sequences * width
        if runs and slots <= costs.budget and costs.cost_model.cost((slots, slots * width, num_scored)) <= max_cost:
            runs[-1].append(group)
        else:
            runs.append([group])
            num_sequences, num_scored = lengths.num_sequences, lengths.total_scored
    return runs


def _add(first: GroupLengths, second: GroupLengths) -> GroupLengths:
    return combine((first, second))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
