"""Which rank gets which micro-batches of a step, and what the step then costs.

Where ranks wait for one another depends on how the model is wrapped:

- ``step``: if only gradients are exchanged, as in DDP, a step takes as long as its busiest rank.
- ``micro_batch``: if weights are gathered in the first forward pass of a micro-batch and kept for its others, as in
  FSDP2, ranks wait in that pass, and again when the micro-batch is done.
- ``pass``: if every pass gathers weights, ranks wait in each, and those with fewer passes wait for the others.

So a step takes the sum, over *phases*, of the time of the phase's slowest rank. In mode ``two_pass`` the prompts of a
micro-batch are a phase, and common beginnings of its groups are another; in the other modes there is one phase.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvpref.data.batching.group_costs import GroupCosts, Phases, Runs, Waits


def deal(runs: Runs, costs: GroupCosts, world_size: int) -> list[Runs]:
    """Give each rank equally many runs, costliest first; some get one more if the number is not divisible.

    Runs of one round cost about the same, and inside a round the costliest goes to the rank that has done the least.
    """
    costed = sorted(((costs.run_cost(run), run) for run in runs), reverse=True)
    ranks: list[Runs] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for start in range(0, len(costed), world_size):
        by_load = sorted(range(world_size), key=loads.__getitem__)
        for rank, (cost, run) in zip(by_load, costed[start : start + world_size], strict=False):
            ranks[rank].append(run)
            loads[rank] += cost
    return ranks


def step_cost(ranks: Iterable[Iterable[Phases]], waits: Waits) -> float:
    """The cost of a step, given the phases of each rank's micro-batches, equally many, in running order."""
    if waits == "step":
        return max(sum(map(sum, rank)) for rank in ranks)
    return sum(_slowest(row) for row in zip(*ranks, strict=True))


def cost_of_runs(runs: Runs, costs: GroupCosts, world_size: int, waits: Waits) -> float:
    """The cost of a step of these runs, dealt by `deal`; missing runs of a round cost nothing."""
    if waits == "step":
        return max(sum(map(costs.run_cost, rank)) for rank in deal(runs, costs, world_size))
    found = sorted((costs.run_phases(run, waits) for run in runs), key=sum, reverse=True)
    return sum(_slowest(found[start : start + world_size]) for start in range(0, len(found), world_size))


def _slowest(row: Sequence[Phases]) -> float:
    return sum(map(max, zip(*row, strict=True)))
