"""Cutting a step into micro-batches, against the best of all ways where those are few."""

from __future__ import annotations

import itertools

import pytest
from group_lengths import group_lengths, random_pairs
from hypothesis import given
from hypothesis import strategies as st

from kvpref.data import CostModel, StepBatcher, StepOptions
from kvpref.data.batching.cutting import cut_by_cost, cut_by_length, halve_to_multiple
from kvpref.data.batching.group_costs import GroupCosts, Runs

FLOPS = CostModel(per_token=100.0, per_pair=1.0, per_scored=300.0, per_micro_batch=2000.0)


@st.composite
def padded_steps(draw: st.DrawFn) -> tuple[GroupCosts, int]:
    lengths = draw(st.lists(group_lengths, min_size=1, max_size=8))
    largest = max(group.num_sequences * group.max_sequence_tokens for group in lengths)
    budget = draw(st.none() | st.integers(largest, 4 * largest))
    return GroupCosts(lengths, "padded", FLOPS, budget), draw(st.integers(1, 3))


@given(padded_steps())
def test_padded_runs_are_as_even_as_any_cut_of_the_sorted_groups(case):
    costs, world_size = case
    ordered = sorted(range(len(costs.lengths)), key=lambda group: costs.lengths[group].max_sequence_tokens)
    best = {num: cheapest_cut(ordered, costs, num) for num in range(1, len(ordered) + 1)}
    fewest = min(num for num, cost in best.items() if cost is not None)
    num_runs = min(-(-fewest // world_size) * world_size, len(ordered))
    runs = cut_by_length(range(len(ordered)), costs, world_size)
    assert len(runs) == num_runs
    # Bisection stops 2^-12 of its interval short, and the interval is smaller than the costliest possible run.
    assert max(map(costs.run_cost, runs)) <= best[num_runs] + costs.run_cost(ordered) / 4096


def cheapest_cut(ordered: list[int], costs: GroupCosts, num_runs: int) -> float | None:
    """The smallest possible cost of the costliest of so many runs, or None where the budget allows none."""
    best = None
    for cuts in itertools.combinations(range(1, len(ordered)), num_runs - 1):
        runs = [ordered[start:end] for start, end in itertools.pairwise((0, *cuts, len(ordered)))]
        if all(costs.run_tokens(run) <= costs.budget for run in runs):
            costliest = max(map(costs.run_cost, runs))
            best = costliest if best is None else min(best, costliest)
    return best


@given(st.lists(group_lengths, min_size=2, max_size=7), st.integers(2, 3))
def test_without_budget_the_costliest_is_within_graham_s_bound(lengths, num_runs):
    costs = GroupCosts(lengths, "packed", FLOPS)
    runs = cut_by_cost(range(len(lengths)), costs, num_runs)
    if len(lengths) >= num_runs:
        assert len(runs) == num_runs
        best = min(
            max(
                sum(costs.costs[group] for group, place in enumerate(places) if place == run) for run in range(num_runs)
            )
            for places in itertools.product(range(num_runs), repeat=len(lengths))
        )
        costliest = max(map(costs.run_cost, runs)) - FLOPS.per_micro_batch
        assert costliest <= (4 / 3 - 1 / (3 * num_runs)) * best * (1 + 1e-12)


@given(st.lists(group_lengths, min_size=1, max_size=40), st.floats(1, 4), st.sampled_from([1, 2, 4]))
def test_no_more_micro_batches_than_first_fit_decreasing_takes(lengths, factor, world_size):
    budget = int(factor * max(group.unique_tokens for group in lengths))
    costs = GroupCosts(lengths, "two_pass", FLOPS, budget)
    runs = cut_by_cost(range(len(lengths)), costs, world_size)
    assert sorted(group for run in runs for group in run) == list(range(len(lengths)))
    assert all(run and costs.run_tokens(run) <= budget for run in runs)
    room: list[int] = []
    for tokens in sorted(costs.tokens, reverse=True):
        fits = [index for index, left in enumerate(room) if left >= tokens]
        if fits:
            room[fits[0]] -= tokens
        else:
            room.append(budget - tokens)
    # First and best fit decreasing may differ by one; either is within 11/9 of the fewest.
    assert len(runs) <= min(-(-(len(room) + 1) // world_size) * world_size, len(lengths))


def test_what_costs_nothing_still_fills_every_micro_batch():
    costs = GroupCosts(random_pairs(6), "packed", CostModel(per_token=0.0, per_micro_batch=1.0))
    assert [len(run) for run in cut_by_cost(range(6), costs, 3)] == [2, 2, 2]


def test_best_fit_is_used_where_even_costs_find_no_room():
    # By cost the 6s and 5s come apart and leave no room of 4 and 3 in three runs of 10; tightly packed they fit.
    lengths = random_pairs(1) * 6
    costs = GroupCosts(lengths, "two_pass", CostModel(), budget=10)
    costs.tokens, costs.costs = [6, 4, 7, 3, 5, 5], [6.0, 4.0, 7.0, 3.0, 1.0, 1.0]
    runs = cut_by_cost(range(6), costs, 1)
    assert sorted(map(sorted, runs)) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("world_size", "expected"), [(1, 2), (2, 2), (3, 3), (4, 4), (8, 6)])
def test_the_costliest_run_is_halved_until_the_number_fits(world_size, expected):
    lengths = random_pairs(6)
    costs = GroupCosts(lengths, "padded", FLOPS)
    halved = halve_to_multiple([[0, 1, 2, 3], [4, 5]], costs, world_size)
    assert len(halved) == expected
    assert sorted(group for run in halved for group in run) == list(range(6))
    if world_size == 3:
        pieces = [run for run in halved if run != [4, 5]]
        ways = [([0, 1, 2, 3][:cut], [0, 1, 2, 3][cut:]) for cut in (1, 2, 3)]
        assert max(map(costs.run_cost, pieces)) == min(max(map(costs.run_cost, way)) for way in ways)


class SortedGreedily(StepBatcher):
    """The rule before costs were known: length-sorted groups, cut where the budget is full, then halved."""

    def cut(self, groups: list[int]) -> Runs:
        runs: Runs = []
        for group in sorted(groups, key=self.costs.tokens.__getitem__):
            if runs and self.costs.run_tokens([*runs[-1], group]) <= self.costs.budget:
                runs[-1].append(group)
            else:
                runs.append([group])
        return halve_to_multiple(runs, self.costs, self.options.world_size)

    def _balanced(self, ranks: list[Runs]) -> list[Runs]:
        return ranks


@pytest.mark.parametrize("mode", ["two_pass", "packed", "padded"])
@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_wait_less_than_with_greedy_cuts(mode, world_size, seed):
    options = StepOptions(groups_per_step=32, world_size=world_size, max_tokens_per_micro_batch=1500, mode=mode)
    lengths = random_pairs(320, seed)
    now, before = (kind(lengths, options, cost_model=FLOPS) for kind in (StepBatcher, SortedGreedily))
    assert imbalance(now) < imbalance(before)
    assert num_micro_batches(now) <= num_micro_batches(before)


def imbalance(batcher: StepBatcher) -> float:
    loads = [[sum(map(batcher.micro_batch_cost, rank)) for rank in step] for step in batcher.steps(0)]
    return sum(max(step) * len(step) / sum(step) - 1 for step in loads) / len(loads)


def num_micro_batches(batcher: StepBatcher) -> int:
    return sum(len(rank) for step in batcher.steps(0) for rank in step)
