"""Groups that change places between ranks: never for the worse, close to the best plan where those are few."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from group_lengths import group_lengths, make_lengths, random_pairs
from hypothesis import given
from hypothesis import strategies as st

from kvpref.data import Clusters, CostModel, StepBatcher, StepOptions
from kvpref.data.batching.balancing import balance
from kvpref.data.batching.costs import COUNTS
from kvpref.data.batching.cutting import cut_by_cost
from kvpref.data.batching.dealing import cost_of_runs, deal, step_cost
from kvpref.data.batching.group_costs import WAITS, GroupCosts, Runs
from kvpref.errors import InputError

FLOPS = CostModel(per_token=100.0, per_pair=1.0, per_scored=300.0, per_micro_batch=2000.0)
MODES = sorted(set(COUNTS) - {"padded"})


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[Runs], GroupCosts]:
    """Any plan that keeps a budget, the same number of micro-batches on every rank."""
    lengths = draw(st.lists(group_lengths, min_size=2, max_size=24))
    mode = draw(st.sampled_from(MODES))
    num_ranks = draw(st.integers(1, min(4, len(lengths))))
    per_rank = draw(st.integers(1, min(3, len(lengths) // num_ranks)))
    places: Runs = [[group] for group in range(num_ranks * per_rank)]
    for group in range(len(places), len(lengths)):
        places[draw(st.integers(0, len(places) - 1))].append(group)
    of_group = tuple(draw(st.integers(0, 3)) for _ in lengths)
    clusters = Clusters(
        of_group=tuple(map(of_group.index, of_group)), shared_tokens=(1,) * len(lengths), min_shared_tokens=1
    )
    unbounded = GroupCosts(lengths, mode, FLOPS, clusters=draw(st.sampled_from([None, clusters])))
    fullest = max(map(unbounded.run_tokens, places))
    budget = draw(st.none() | st.integers(fullest, 2 * fullest))
    costs = GroupCosts(lengths, mode, FLOPS, budget, unbounded.clusters)
    return [places[start : start + per_rank] for start in range(0, len(places), per_rank)], costs


def cost_of(ranks: list[Runs], costs: GroupCosts, waits) -> float:
    return step_cost([[costs.run_phases(run, waits) for run in rank] for rank in ranks], waits)


def dealt_cost(ranks: list[Runs], costs: GroupCosts, waits) -> float:
    return cost_of(deal([run for rank in ranks for run in rank], costs, len(ranks)), costs, waits)


@given(plans(), st.sampled_from(WAITS))
def test_a_plan_keeps_its_groups_and_budget_and_costs_no_more(plan, waits):
    ranks, costs = plan
    better = balance(ranks, costs, waits)
    assert [len(rank) for rank in better] == [len(rank) for rank in ranks]
    flat = [run for rank in better for run in rank]
    assert all(flat)
    assert Counter(group for run in flat for group in run) == Counter(range(len(costs.lengths)))
    assert all(costs.run_tokens(run) <= costs.budget for run in flat)
    cost = cost_of if waits == "step" else dealt_cost
    assert cost(better, costs, waits) <= cost(ranks, costs, waits) * (1 + 1e-12)
    assert balance(ranks, costs, waits) == better


def cheapest_step(costs: GroupCosts, num_ranks: int, per_rank: int, waits) -> float:
    """Of all ways to fill so many micro-batches, none empty."""
    num_places = num_ranks * per_rank
    best = float("inf")
    for places in itertools.product(range(num_places), repeat=len(costs.lengths)):
        if len(set(places)) < num_places:
            continue
        runs: Runs = [[] for _ in range(num_places)]
        for group, place in enumerate(places):
            runs[place].append(group)
        by_rank = [runs[start : start + per_rank] for start in range(0, num_places, per_rank)]
        best = min(best, cost_of(by_rank, costs, waits))
    return best


@pytest.mark.parametrize("waits", WAITS)
@pytest.mark.parametrize(("num_groups", "num_ranks", "per_rank"), [(8, 2, 1), (6, 3, 1), (6, 2, 2)])
def test_steps_are_close_to_the_cheapest_of_all(waits, num_groups, num_ranks, per_rank):
    excess = []
    for seed in range(6):
        lengths = random_pairs(num_groups, seed)
        costs = GroupCosts(lengths, "two_pass", FLOPS)
        runs = cut_by_cost(range(num_groups), costs, num_ranks * per_rank, waits)
        assert len(runs) == num_ranks * per_rank
        ranks = balance(deal(runs, costs, num_ranks), costs, waits)
        if waits != "step":
            ranks = deal([run for rank in ranks for run in rank], costs, num_ranks)
        excess.append(cost_of(ranks, costs, waits) / cheapest_step(costs, num_ranks, per_rank, waits) - 1)
    # An exchange moves one group or swaps two, and raises no phase; what is better may take more.
    mean, most = (0.02, 0.1) if waits == "step" else (0.06, 0.16)
    assert min(excess) >= -1e-12
    assert sum(excess) / len(excess) < mean
    assert max(excess) < most


def giant_and_small() -> list:
    return [make_lengths([1000]), *[make_lengths([50])] * 80]


def test_a_round_with_a_giant_is_filled_up_to_it_so_that_other_rounds_cost_less():
    # 5000 tokens on 4 ranks; at most 1000 in a micro-batch, so at least 2 rounds: 1000 and 250, not 1000 and 571.
    options = StepOptions(groups_per_step=81, world_size=4, max_tokens_per_micro_batch=1000, shuffle=False)
    (step,) = StepBatcher(giant_and_small(), options).steps()
    costs = [[sum(50 if group else 1000 for group in batch.group_indices) for batch in rank] for rank in step]
    assert [sum(rank) for rank in costs] == [1250] * 4


def test_what_a_rank_does_is_evened_out_where_ranks_wait_at_the_end():
    lengths = [make_lengths([length]) for length in (9, 8, 7, 6, 5, 4, 3, 2, 2, 2)]
    costs = GroupCosts(lengths, "packed", CostModel())
    uneven = [[[0, 1], [2, 3]], [[4, 5, 6], [7, 8, 9]]]
    assert cost_of(balance(uneven, costs, "step"), costs, "step") == 24


def test_groups_of_a_cluster_move_together():
    lengths = [make_lengths([10], prompt=100)] * 2 + [make_lengths([n]) for n in (130, 60, 40, 20)]
    clusters = Clusters(of_group=(0, 0, 2, 3, 4, 5), shared_tokens=(100, 100, 0, 0, 0, 0), min_shared_tokens=1)
    costs = GroupCosts(lengths, "two_pass", CostModel(), clusters=clusters)
    ranks = balance([[[0, 1, 2]], [[3, 4, 5]]], costs, "step")
    assert any({0, 1} <= set(run) for rank in ranks for run in rank)
    # 250 and 120 at first; apart, the two groups alone would cost 100 more.
    assert cost_of(ranks, costs, "step") <= 190


@pytest.mark.parametrize("waits", WAITS)
@pytest.mark.parametrize("world_size", [8, 64])
def test_steps_of_many_ranks_cost_little_more_than_the_mean(waits, world_size):
    options = StepOptions(
        groups_per_step=8 * world_size, world_size=world_size, max_tokens_per_micro_batch=1000, waits=waits
    )
    batcher = StepBatcher(random_pairs(16 * world_size), options, cost_model=FLOPS)
    for step in batcher.steps():
        phases = [[batcher.costs.run_phases(batch.group_indices, waits) for batch in rank] for rank in step]
        mean = sum(sum(run) for rank in phases for run in rank) / world_size
        assert step_cost(phases, waits) <= {"step": 1.02, "micro_batch": 1.05, "pass": 1.12}[waits] * mean


@given(st.lists(group_lengths, min_size=1, max_size=12), st.integers(1, 4))
def test_the_cost_of_runs_is_that_of_the_step_they_are_dealt_to(lengths, world_size):
    costs = GroupCosts(lengths, "packed", FLOPS)
    runs = [[group] for group in range(len(lengths))]
    ranks = [[(costs.run_cost(run),) for run in rank] for rank in deal(runs, costs, world_size)]
    most = max(map(len, ranks))
    padded = [[*rank, *[(0.0,)] * (most - len(rank))] for rank in ranks]
    for waits in WAITS:
        assert cost_of_runs(runs, costs, world_size, waits) == pytest.approx(step_cost(padded, waits))


def test_unknown_waits_are_refused():
    with pytest.raises(InputError, match="waits must be one of step, micro_batch, pass; got 'never'"):
        StepOptions(groups_per_step=1, waits="never")


def test_phases_are_what_groups_share_their_prompts_and_their_responses():
    lengths = [make_lengths([10, 20], prompt=100), make_lengths([30, 5], prompt=90), make_lengths([7, 8], prompt=40)]
    clusters = Clusters(of_group=(0, 0, 2), shared_tokens=(80, 80, 0), min_shared_tokens=1)
    costs = GroupCosts(lengths, "two_pass", CostModel(), clusters=clusters)
    assert costs.run_phases([0], "step") == (130.0,)
    assert costs.run_phases([0], "pass") == (0.0, 100.0, 30.0)
    assert costs.run_phases([0, 2], "pass") == (0.0, 140.0, 45.0)
    # The story and the third prompt; what remains of two prompts and the third's responses; their responses.
    assert costs.run_phases([0, 1, 2], "pass") == (80.0 + 40, 20.0 + 10 + 15, 30.0 + 35)
    assert costs.run_phases([0], "micro_batch") == pytest.approx((100 / 3, 130 - 100 / 3))
    assert GroupCosts(lengths, "packed", CostModel()).run_phases([0], "pass") == (230.0,)


def test_phases_are_evened_out_where_ranks_wait_in_each():
    # Each rank could have one long prompt with short responses and one of the other kind: 110 and 110, not 200 and 200.
    lengths = [make_lengths([5, 5], prompt=100)] * 2 + [make_lengths([50, 50], prompt=10)] * 2
    costs = GroupCosts(lengths, "two_pass", CostModel())
    uneven = [[[0, 1]], [[2, 3]]]
    assert cost_of(uneven, costs, "pass") == 400
    assert cost_of(balance(uneven, costs, "pass"), costs, "pass") == 220
