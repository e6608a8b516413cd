"""How the groups of one optimizer step are cut into micro-batches that keep the token budget and cost about the same.

Two rules, because padding couples groups. Without padding, tokens and cost of a micro-batch are sums over its groups,
so any groups may go together and `cut_by_cost` evens the costs out. In mode ``padded`` a group is padded to the longest
of its micro-batch, so `cut_by_length` keeps groups of similar length together. If prompts are encoded once,
`cut_together` also keeps groups with common beginnings together.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import accumulate
from math import inf
from operator import add

from kvpref.data.batching.dealing import cost_of_runs
from kvpref.data.batching.group_costs import GroupCosts, Runs, Waits
from kvpref.data.batching.lengths import GroupLengths, combine

_PART_SHARES = (1.0, 0.75, 0.5, 0.33, 0.25)
"""What parts of clusters may cost, as shares of a rank's work."""

_CHEAPEST_SEEN = 8
"""Among this many of the cheapest micro-batches, the one whose phases stay most even is taken."""

_BISECTIONS = 12
"""Halvings of the interval that contains the smallest possible cost of the costliest run."""


def cut_by_cost(groups: Sequence[int], costs: GroupCosts, world_size: int, waits: Waits = "micro_batch") -> Runs:
    """Cut groups so that micro-batches cost about the same; for modes whose counts add up over groups.

    Uses as few micro-batches as two heuristics allow: costliest group first, each to the cheapest micro-batch with room
    (Graham 1969, "Bounds on multiprocessing timing anomalies"), which evens costs out; if that finds no room, best fit
    decreasing (Johnson 1974, "Fast algorithms for bin packing"), which packs more tightly.
    If ranks wait at each micro-batch, all micro-batches in the round of the costliest group may cost as much as it
    does, so that the other rounds cost less: see `_round_by_round`.

    Args:
        groups: Indices of a step's groups, each within the budget.
        costs: The costs of all groups.
        world_size: The number of micro-batches is a multiple of it, unless every group is alone.
        waits: Where ranks wait for one another.
    """
    packed = _best_fit(groups, costs)
    fewest = max(1, int(-(-sum(costs.tokens[group] for group in groups) // costs.budget)))
    most = min(_round_up(len(packed), world_size), len(groups))
    for num_runs in range(_round_up(fewest, world_size), most + 1, world_size):
        runs = _costliest_first(groups, costs, num_runs, waits)
        if num_runs > world_size > 1 and waits != "step":
            by_round = _round_by_round(groups, costs, num_runs, world_size, waits)
            found = [runs for runs in (runs, by_round) if runs is not None]
            runs = min(found, key=lambda runs: cost_of_runs(runs, costs, world_size, waits), default=None)
        if runs is not None:
            return runs
    return halve_to_multiple(packed, costs, world_size)


def cut_together(groups: Sequence[int], costs: GroupCosts, world_size: int, waits: Waits = "micro_batch") -> Runs:
    """Cut groups by cost, keeping clusters together as long as that saves more than ranks wait.

    For modes that encode prompts once. Each cluster of the step, in parts as large as the budget allows, is treated
    like one group. The same is tried with ever cheaper parts, down to every group on its own.

    Args:
        groups: Indices of a step's groups, each within the budget, those of a cluster next to one another.
        costs: The costs of all groups.
        world_size: The number of micro-batches is a multiple of it, unless every group is alone.
        waits: Where ranks wait for one another.
    """
    best = cut_by_cost(groups, costs, world_size, waits)
    parts = _cluster_parts(groups, costs, inf)
    if len(parts) == len(groups):
        return best
    least = cost_of_runs(best, costs, world_size, waits)
    mean = sum(map(costs.run_cost, parts)) / world_size
    tried = len(groups)
    for share in _PART_SHARES:
        if len(parts) == tried:
            continue
        tried = len(parts)
        lengths = [costs.run_lengths(part) for part in parts]
        whole = GroupCosts(lengths, costs.mode, costs.cost_model, costs.budget)
        whole.prompts = list(map(costs.run_prompts, parts))
        cut = cut_by_cost(range(len(parts)), whole, world_size, waits)
        runs = [[group for part in run for group in parts[part]] for run in cut]
        runs = halve_to_multiple(runs, costs, world_size)
        cost = cost_of_runs(runs, costs, world_size, waits)
        if cost <= least:
            best, least = runs, cost
        parts = _cluster_parts(groups, costs, share * mean)
    return best


def cut_by_length(groups: Sequence[int], costs: GroupCosts, world_size: int) -> Runs:
    """Cut length-sorted groups into runs whose costliest is as cheap as the number of runs allows; for ``padded``.

    The number of runs is the fewest that the budget allows, rounded up to a multiple of `world_size`.

    Args:
        groups: Indices of a step's groups, each within the budget.
        costs: The costs of all groups.
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
    costliest_first = [(-costs.run_cost(run), index) for index, run in enumerate(runs) if len(run) > 1]
    heapify(costliest_first)
    while len(runs) % world_size and costliest_first:
        _, index = heappop(costliest_first)
        runs[index], rest = _halve(runs[index], costs)
        runs.append(rest)
        for at in (index, len(runs) - 1):
            if len(runs[at]) > 1:
                heappush(costliest_first, (-costs.run_cost(runs[at]), at))
    return runs


def _halve(run: list[int], costs: GroupCosts) -> Runs:
    """Cut a run so that the costlier part costs least."""
    lengths = [costs.lengths[group] for group in run]
    before = [costs.cost(part) for part in accumulate(lengths, _add)]
    after = [costs.cost(part) for part in accumulate(reversed(lengths), _add)][::-1]
    at = min(range(1, len(run)), key=lambda cut: max(before[cut - 1], after[cut]))
    return [run[:at], run[at:]]


def _cluster_parts(groups: Sequence[int], costs: GroupCosts, most: float) -> Runs:
    """Neighbours of one cluster that fit the budget together and cost at most `most`."""
    parts: Runs = []
    for group in groups:
        assert costs.clusters is not None
        cluster = costs.clusters.of_group[group]
        joins = bool(parts) and costs.clusters.of_group[parts[-1][0]] == cluster
        if joins and _may_join(parts[-1], group, costs, most):
            parts[-1].append(group)
        else:
            parts.append([group])
    return parts


def _may_join(part: list[int], group: int, costs: GroupCosts, most: float) -> bool:
    together = [*part, group]
    return costs.run_tokens(together) <= costs.budget and (most == inf or costs.run_cost(together) <= most)


def _costliest_first(groups: Sequence[int], costs: GroupCosts, num_runs: int, waits: Waits) -> Runs | None:
    """Assign groups, costliest first, each to a cheap run with room; None if one finds no room.

    That is the cheapest run or, if micro-batches have several phases, the one of a few whose phases stay most even.
    """
    phases = {group: costs.run_phases([group], waits) for group in groups}
    means = [sum(column) / num_runs or 1.0 for column in zip(*phases.values(), strict=True)]
    runs: Runs = [[] for _ in range(num_runs)]
    room = [costs.budget] * num_runs
    loads = [[0.0] * len(means) for _ in range(num_runs)]
    # If ranks wait in every pass, what two groups share takes a separate pass on every rank.
    apart = waits == "pass" and costs.clusters is not None
    begun: list[set[int]] = [set() for _ in runs]
    # The number of groups breaks ties, so that no run stays empty if groups cost nothing.
    cheapest_first = [(0.0, 0, index) for index in range(num_runs)]
    for group in sorted(groups, key=costs.costs.__getitem__, reverse=True):
        least, chosen = inf, None
        seen = 0
        for place, (_, _, index) in enumerate(cheapest_first):
            if room[index] < costs.tokens[group] or (apart and costs.cluster_of(group) in begun[index]):
                continue
            most = max(map(_share, loads[index], phases[group], means))
            if most < least:
                least, chosen = most, place
            seen += 1
            if seen == (_CHEAPEST_SEEN if len(means) > 1 else 1):
                break
        if chosen is None:
            return None
        load, count, index = cheapest_first.pop(chosen)
        runs[index].append(group)
        room[index] -= costs.tokens[group]
        if apart:
            begun[index].add(costs.cluster_of(group))
        loads[index] = list(map(add, loads[index], phases[group]))
        insort(cheapest_first, (load + costs.costs[group], count + 1, index))
    return runs


def _share(load: float, more: float, mean: float) -> float:
    return (load + more) / mean


def _round_by_round(
    groups: Sequence[int], costs: GroupCosts, num_runs: int, world_size: int, waits: Waits
) -> Runs | None:
    """Fill rounds one after another up to the cost of the costliest remaining group; None if that finds no room.

    A round costs what its costliest micro-batch does, so all of its micro-batches may cost that.
    """
    left = sorted(groups, key=costs.costs.__getitem__, reverse=True)
    runs: Runs = []
    while len(runs) < num_runs - world_size and left:
        level = max(costs.costs[left[0]], sum(costs.costs[group] for group in left) / (num_runs - len(runs)))
        filled, left = _fill_round(left, costs, world_size, level)
        runs += filled
    last = _costliest_first(left, costs, world_size, waits) if len(left) >= world_size else None
    return None if last is None or not all(runs) else [*runs, *last]


def _fill_round(ordered: list[int], costs: GroupCosts, world_size: int, level: float) -> tuple[Runs, list[int]]:
    """Assign groups, costliest first, each to the cheapest run that stays below the level; returns runs and rest."""
    runs: Runs = [[] for _ in range(world_size)]
    room = [costs.budget] * world_size
    cheapest_first = [(0.0, index) for index in range(world_size)]
    rest = []
    for group in ordered:
        load, index = cheapest_first[0]
        if load + costs.costs[group] <= level and room[index] >= costs.tokens[group]:
            runs[index].append(group)
            room[index] -= costs.tokens[group]
            heapreplace(cheapest_first, (load + costs.costs[group], index))
        else:
            rest.append(group)
    return runs, rest


def _best_fit(groups: Sequence[int], costs: GroupCosts) -> Runs:
    """Assign groups, longest first, each to the fullest run with room, or to a new one."""
    runs: Runs = []
    rooms: list[tuple[float, int]] = []  # sorted (remaining budget, run)
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
