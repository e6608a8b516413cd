"""Rules for cutting a step into micro-batches that were compared with those kept in `kvpref.data.batching.cutting`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

from kvpref.data import GroupLengths, StepPlanner
from kvpref.data.batching.costs import COUNTS
from kvpref.data.batching.cutting import GroupCosts, Runs, cut_by_cost, cut_by_length, halve_to_multiple
from kvpref.data.batching.lengths import combine

Rule = Callable[[Sequence[int], GroupCosts, int], Runs]


def planner_with(rule: str) -> type[StepPlanner]:
    """A planner that cuts steps by a rule of `RULES`."""

    class RuledPlanner(StepPlanner):
        def cut(self, groups: Sequence[int]) -> Runs:
            return RULES[rule](groups, self.costs, self.options.world_size)

    return RuledPlanner


class _Run:
    """A run and its counts, extended a group at a time."""

    def __init__(self, costs: GroupCosts) -> None:
        self.costs = costs
        self.groups: list[int] = []
        self.lengths: GroupLengths | None = None

    def with_group(self, group: int) -> GroupLengths:
        lengths = self.costs.lengths[group]
        return lengths if self.lengths is None else combine((self.lengths, lengths))

    def has_room(self, group: int) -> bool:
        return _tokens(self.costs, self.with_group(group)) <= self.costs.budget

    def add(self, group: int) -> None:
        self.lengths = self.with_group(group)
        self.groups.append(group)


def _tokens(costs: GroupCosts, lengths: GroupLengths) -> int:
    return COUNTS[costs.mode](lengths)[0]


def length_sorted(groups: Sequence[int], costs: GroupCosts, world_size: int) -> Runs:
    """Length-sorted groups, cut where the budget is full; then the costliest halved to a multiple of the ranks."""
    key = (lambda g: costs.lengths[g].max_sequence_tokens) if costs.mode == "padded" else costs.tokens.__getitem__
    runs: list[_Run] = []
    for group in sorted(groups, key=key):
        if not runs or not runs[-1].has_room(group):
            runs.append(_Run(costs))
        runs[-1].add(group)
    return halve_to_multiple([run.groups for run in runs], costs, world_size)


def first_fit_decreasing(groups: Sequence[int], costs: GroupCosts, world_size: int) -> Runs:
    """Each group, the longest first, to the first run with room; then halved to a multiple of the ranks."""
    runs: list[_Run] = []
    for group in sorted(groups, key=costs.tokens.__getitem__, reverse=True):
        run = next((run for run in runs if run.has_room(group)), None)
        if run is None:
            run = _Run(costs)
            runs.append(run)
        run.add(group)
    return halve_to_multiple([run.groups for run in runs], costs, world_size)


def longest_to_cheapest(groups: Sequence[int], costs: GroupCosts, world_size: int) -> Runs:
    """Each group, the longest first, to the run with room that is cheapest with it; padding counts, runs may mix."""
    fewest = len(cut_by_length(groups, costs, 1)) if costs.mode == "padded" else len(cut_by_cost(groups, costs, 1))
    start = -(-fewest // world_size) * world_size
    for num_runs in range(start, len(groups), world_size):
        runs = [_Run(costs) for _ in range(num_runs)]
        for group in sorted(groups, key=lambda group: costs.lengths[group].max_sequence_tokens, reverse=True):
            rooms = [run for run in runs if run.has_room(group)]
            if not rooms:
                break
            min(rooms, key=lambda run: costs.cost(run.with_group(group))).add(group)
        else:
            return halve_to_multiple([run.groups for run in runs if run.groups], costs, world_size)
    return [[group] for group in groups]


def karmarkar_karp(groups: Sequence[int], costs: GroupCosts, world_size: int) -> Runs:
    """Largest differencing (Karmarkar and Karp 1982); where it breaks the budget, the rule that is kept."""
    kept = cut_by_cost(groups, costs, world_size)
    num_runs = len(kept)
    heap = [
        (-costs.costs[group], index, [(costs.costs[group], [group])] + [(0.0, [])] * (num_runs - 1))
        for index, group in enumerate(groups)
    ]
    heapify(heap)
    for index in range(len(groups), 2 * len(groups) - 1):
        _, _, first = heappop(heap)
        _, _, second = heappop(heap)
        merged = sorted(
            ((x + y, [*one, *other]) for (x, one), (y, other) in zip(first, reversed(second), strict=True)),
            key=lambda part: -part[0],
        )
        heappush(heap, (merged[-1][0] - merged[0][0], index, merged))
    runs = [part for _, part in heap[0][2]]
    fits = all(part and sum(costs.tokens[group] for group in part) <= costs.budget for part in runs)
    return runs if fits else kept


RULES: dict[str, Rule] = {
    "length_sorted": length_sorted,
    "first_fit_decreasing": first_fit_decreasing,
    "longest_to_cheapest": longest_to_cheapest,
    "karmarkar_karp": karmarkar_karp,
    "cut_by_cost": cut_by_cost,
    "cut_by_length": cut_by_length,
}

RULES_OF_MODE = {
    "two_pass": ("length_sorted", "first_fit_decreasing", "karmarkar_karp", "cut_by_cost"),
    "packed": ("length_sorted", "first_fit_decreasing", "karmarkar_karp", "cut_by_cost"),
    "padded": ("length_sorted", "first_fit_decreasing", "longest_to_cheapest", "cut_by_length"),
}
"""What is compared; the last of each mode is what kvpref does. The first is what it did before costs were known."""
