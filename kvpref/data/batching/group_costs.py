"""Tokens and cost of any set of groups."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Literal

from kvpref.data.batching.costs import COUNTS, SHARING_MODES, CostModel, Mode
from kvpref.data.batching.lengths import GroupLengths, combine, combine_sharing
from kvpref.data.batching.sharing import Clusters

Runs = list[list[int]]
"""Micro-batches of one step: indices of groups."""

Waits = Literal["step", "micro_batch", "pass"]
"""Where ranks wait for one another; see `kvpref.data.batching.dealing`."""

WAITS: tuple[Waits, ...] = ("step", "micro_batch", "pass")

Phases = tuple[float, ...]
"""The cost of each phase of a micro-batch, between two points where ranks wait for one another."""

_FORWARD = 1 / 3
"""Approximate share of the forward in a forward and backward."""


class GroupCosts:
    """Tokens and cost of any set of groups.

    Args:
        lengths: Counts per group.
        mode: The mode, which decides what the model computes.
        cost_model: The cost of that.
        budget: Most tokens of a micro-batch; None for no bound.
        clusters: Which groups begin alike, used in modes that encode prompts once; None if no groups do.

    Attributes:
        lengths: Counts per group.
        mode: The mode, which decides what the model computes.
        cost_model: The cost of counts.
        budget: Most tokens of a micro-batch, infinite without a bound.
        tokens: Share of the budget that each group takes: its own tokens, or the whole budget if they exceed it.
        costs: Cost of each group alone, without the fixed cost of a micro-batch.
        prompts: The part of that in the first pass: the prompt's, or all if nothing is shared; 0 in modes other than
            ``two_pass``.
        clusters: Which groups begin alike; None if that does not matter.
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
        self._tokens = [group[0] for group in counts]
        self.tokens = self._tokens if budget is None else [min(tokens, budget) for tokens in self._tokens]
        self.costs = [cost_model.cost(group) - cost_model.per_micro_batch for group in counts]
        self.prompts = [0.0] * len(lengths)
        if mode == "two_pass":
            self.prompts = [
                min(cost, self._prompt_cost(group)) for cost, group in zip(self.costs, lengths, strict=True)
            ]

    def run_tokens(self, run: Sequence[int]) -> int:
        """Tokens that the model processes for a micro-batch of these groups, padding included."""
        return self._tokens[run[0]] if len(run) == 1 else self._counts(self.run_lengths(run))[0]

    def run_cost(self, run: Sequence[int]) -> float:
        """Cost of a micro-batch of these groups, in the cost model's unit."""
        if len(run) == 1:
            return self.costs[run[0]] + self.cost_model.per_micro_batch
        return self.cost(self.run_lengths(run))

    def cluster_of(self, group: int) -> int:
        """The id of this group's cluster; the group itself without clusters."""
        return group if self.clusters is None else self.clusters.of_group[group]

    def run_prompts(self, run: Sequence[int]) -> float:
        """The prompts' part of a micro-batch's cost; what groups of a cluster share counts once."""
        own = sum(self.prompts[group] for group in run)
        if self.clusters is None or len(run) == 1 or self.mode != "two_pass":
            return own
        shared = sum(self.costs[group] for group in run) + self.cost_model.per_micro_batch - self.run_cost(run)
        return max(0.0, own - shared)

    def run_phases(self, run: Sequence[int], waits: Waits) -> Phases:
        """The cost of a micro-batch of these groups by phase."""
        cost = self.run_cost(run)
        if waits == "step" or self.mode != "two_pass":
            return (cost,)
        if waits == "pass":
            return self._by_pass(run, cost)
        first = _FORWARD * self.run_prompts(run)
        return first, cost - first

    def _by_pass(self, run: Sequence[int], cost: float) -> Phases:
        """Costs of what clusters share, of prompts and of responses; ranks run their last passes together."""
        prompts = self.run_prompts(run)
        members: dict[int, list[int]] = {}
        if self.clusters is not None:
            for group in run:
                members.setdefault(self.clusters.of_group[group], []).append(group)
        sharing = [own for own in members.values() if len(own) > 1]
        if not sharing:
            return 0.0, prompts, cost - prompts
        assert self.clusters is not None
        shared = sum(self._tokens_cost(self.clusters.shared_tokens[own[0]]) for own in sharing)
        # Other groups' prompts run with the shared parts, and their responses with the rest of the prompts.
        apart = [group for own in members.values() if len(own) == 1 for group in own]
        their_prompts = sum(self.prompts[group] for group in apart)
        theirs = sum(self.costs[group] for group in apart) - their_prompts
        rest = max(0.0, prompts - shared - their_prompts)
        first = min(shared + their_prompts, prompts)
        return first, rest + theirs, cost - first - rest - theirs

    def _prompt_cost(self, lengths: GroupLengths) -> float:
        return self._tokens_cost(lengths.beginning_tokens) if lengths.beginning_tokens else inf

    def _tokens_cost(self, num_tokens: int) -> float:
        """Cost of an unscored beginning of a sequence."""
        pairs = num_tokens * (num_tokens + 1) // 2
        return self.cost_model.cost((num_tokens, pairs, 0)) - self.cost_model.per_micro_batch

    def cost(self, lengths: GroupLengths) -> float:
        """Cost of a micro-batch of these counts, in the cost model's unit."""
        return self.cost_model.cost(self._counts(lengths))

    def run_lengths(self, run: Sequence[int]) -> GroupLengths:
        """Combined counts of these groups, with shared beginnings of a cluster encoded once."""
        if len(run) == 1:
            return self.lengths[run[0]]
        if self.clusters is None:
            return combine([self.lengths[group] for group in run])
        members: dict[int, list[GroupLengths]] = {}
        for group in run:
            members.setdefault(self.clusters.of_group[group], []).append(self.lengths[group])
        shared, shortest = self.clusters.shared_tokens, self.clusters.min_shared_tokens
        alone = [own[0] for own in members.values() if len(own) == 1]
        together = [combine_sharing(own, shared[cluster], shortest) for cluster, own in members.items() if len(own) > 1]
        return combine([*alone, *together])
