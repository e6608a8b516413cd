"""Plans of steps for many ranks: balanced by kvpref, and in order of the groups."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rank_files import Measured

from kvpref.data import BatchedStep, CostModel, MicroBatch, StepBatcher, StepOptions, Waits
from kvpref.data.batching.budgets import default_budget
from kvpref.data.batching.group_costs import GroupCosts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of one epoch."""

    steps: list[BatchedStep]
    """Complete steps; without balancing, a rank may have fewer micro-batches than another."""

    last: BatchedStep | None
    """The last step, if it has fewer groups than the others."""

    costs: GroupCosts
    """The costs of all groups."""

    us_per_group: float = 0.0
    """Processor time that planning took, in microseconds."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of steps."""

    num_ranks: int
    groups_per_rank: int
    budget: int
    """Most tokens of a micro-batch."""

    @property
    def groups_per_step(self) -> int:
        return self.num_ranks * self.groups_per_rank


def default_tokens(files: Measured) -> int:
    """The default budget."""
    return default_budget(files.lengths, "two_pass")


def balanced(files: Measured, cost_model: CostModel, sizes: Sizes, waits: Waits) -> Plan:
    """A plan as the trainer makes it."""
    options = StepOptions(
        groups_per_step=sizes.groups_per_step,
        max_tokens_per_micro_batch=sizes.budget,
        world_size=sizes.num_ranks,
        waits=waits,
    )
    batcher = StepBatcher(files.lengths, options, cost_model=cost_model, clusters=files.clusters)
    start = time.process_time()
    steps = batcher.steps(0)
    spent = time.process_time() - start
    complete = len(files.lengths) // sizes.groups_per_step
    return Plan(
        steps=steps[:complete],
        last=steps[-1] if len(steps) > complete else None,
        costs=batcher.costs,
        us_per_group=1e6 * spent / len(files.lengths),
    )


def as_they_come(files: Measured, cost_model: CostModel, sizes: Sizes) -> Plan:
    """A plan in random order, where each rank takes every n-th group and fills one micro-batch after another."""
    costs = GroupCosts(files.lengths, "two_pass", cost_model, sizes.budget, files.clusters)
    order = list(range(len(files.lengths)))
    random.Random("as they come").shuffle(order)
    size, num_ranks = sizes.groups_per_step, sizes.num_ranks
    steps = []
    for start in range(0, len(order), size):
        ranks = (order[start : start + size][rank::num_ranks] for rank in range(num_ranks))
        steps.append(tuple(_filled(rank, costs) for rank in ranks))
    complete = len(order) // size
    return Plan(steps=steps[:complete], last=steps[-1] if len(steps) > complete else None, costs=costs)


def _filled(groups: Sequence[int], costs: GroupCosts) -> tuple[MicroBatch, ...]:
    runs: list[list[int]] = []
    for group in groups:
        if runs and costs.run_tokens([*runs[-1], group]) <= costs.budget:
            runs[-1].append(group)
        else:
            runs.append([group])
    return tuple(MicroBatch(tuple(run)) for run in runs)
