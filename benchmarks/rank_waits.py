"""How long ranks wait for one another in a step, and what they run only to keep in step, by the cost model.

The forward of a pass is taken as a third of its forward and backward. The collectives' own time, and the lower
efficiency of small passes, are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import inf
from typing import NamedTuple

from kvpref.data import BatchedStep, MicroBatch
from kvpref.data.batching.group_costs import GroupCosts
from kvpref.data.batching.lengths import GroupLengths

CHUNK_TOKENS = 8192
"""The default bound of a chunk."""


class Piece(NamedTuple):
    """Some tokens of one pass, with the cost of their forward and backward."""

    num_tokens: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class Played:
    """One simulated step."""

    time: float
    """Its time, in the cost model's unit."""

    work: float
    """Average work of a rank, without dummies."""

    num_passes: int = 0
    """Passes of all ranks, without dummies."""

    num_dummies: int = 0
    """Passes that only keep the ranks in step."""

    num_gathers: int = 0
    """Gathers of one layer's weights, on each rank."""

    num_reductions: int = 0
    """Reductions of one layer's gradients, on each rank."""


class Player:
    """Simulates steps of a model.

    Args:
        costs: The costs of the groups.
        num_layers: Decoder layers, which FSDP gathers separately; embeddings and head are one more unit.
    """

    def __init__(self, costs: GroupCosts, num_layers: int) -> None:
        self._costs, self._units = costs, num_layers + 1
        self._passes_of: dict[tuple[int, ...], list[list[Piece]]] = {}

    def waits_at_the_end(self, step: BatchedStep) -> Played:
        """DDP, and the bounded schedule with weights that stay gathered and gradients reduced once."""
        loads = [sum(map(self._cost, rank)) for rank in step]
        once = self._units
        return self._played(step, max(loads), num_gathers=once, num_reductions=once)

    def full(self, step: BatchedStep) -> Played:
        """Weights are gathered in the first pass of a micro-batch, stay, and gradients are reduced at its end."""
        spent, rounds = 0.0, 0
        for row in zip_longest(*step):
            passes = [self._passes(item) for item in row if item is not None]
            totals = [_cost_of(own) for own in passes]
            firsts = [sum(piece.cost for piece in own[0]) / 3 for own in passes]
            spent += max(firsts) + max(total - first for total, first in zip(totals, firsts, strict=True))
            rounds += 1
        missing = rounds * len(step) - sum(map(len, step))
        num_passes = sum(len(self._passes(item)) for rank in step for item in rank)
        found = self._played(step, spent, num_gathers=rounds * self._units, num_reductions=rounds * self._units)
        return _with_passes(found, num_passes, missing)

    def bounded(self, step: BatchedStep) -> Played:
        """Every chunk gathers weights, layer by layer; ranks with fewer chunks run dummies of one token."""
        spent, num_passes, num_dummies, gathers, reductions = 0.0, 0, 0, 0, 0
        for row in zip_longest(*step):
            chunks = [[] if item is None else _chunks(self._passes(item)) for item in row]
            forward = [[cost / 3 for _, cost in own] for own in chunks]
            kept = [_num_kept(own) for own in chunks]
            fewest = min(kept)
            backward = [_backward(own, fewest) for own in chunks]
            most = max(map(len, chunks))
            # Dummies come first going forward, and last going backward.
            spent += sum(map(max, zip(*([0.0] * (most - len(own)) + own for own in forward), strict=True)))
            spent += sum(map(max, zip(*(own + [0.0] * (most - len(own)) for own in backward), strict=True)))
            num_passes += 2 * sum(map(len, chunks))
            num_dummies += 2 * (most * len(chunks) - sum(map(len, chunks)))
            gathers += (most + (most - fewest) + most) * self._units
            reductions += most * self._units
        found = self._played(step, spent, num_gathers=gathers, num_reductions=reductions)
        # Chunks whose graphs do not stay run forward twice: work, not waiting.
        repeated = sum(
            sum(cost / 3 for _, cost in own[: len(own) - _num_kept(own)])
            for own in (_chunks(self._passes(item)) for rank in step for item in rank if not item.is_filler)
        )
        found = Played(**{**found.__dict__, "work": found.work + repeated / len(step)})
        return _with_passes(found, num_passes, num_dummies)

    def _played(self, step: BatchedStep, spent: float, **counts: int) -> Played:
        work = sum(self._cost(item) for rank in step for item in rank if not item.is_filler)
        return Played(time=spent, work=work / len(step), **counts)

    def _cost(self, item: MicroBatch) -> float:
        return _cost_of(self._passes(item))

    def _passes(self, item: MicroBatch) -> list[list[Piece]]:
        """Pieces by depth: shared parts of groups, prompts, responses."""
        if item.group_indices not in self._passes_of:
            self._passes_of[item.group_indices] = self._find_passes(item.group_indices)
        return self._passes_of[item.group_indices]

    def _find_passes(self, groups: Sequence[int]) -> list[list[Piece]]:
        clusters = self._costs.clusters
        members: dict[int, list[int]] = {}
        for group in groups:
            members.setdefault(group if clusters is None else clusters.of_group[group], []).append(group)
        passes: list[list[Piece]] = [[], [], []]
        for cluster, own in members.items():
            shared = clusters.shared_tokens[cluster] if clusters is not None and len(own) > 1 else 0
            if shared:
                passes[0].append(self._piece(shared, _causal(shared), 0))
            for group in own:
                lengths = self._costs.lengths[group]
                prompt = max(shared, _prompt(lengths))
                depth = 1 if shared else 0
                if prompt > shared:
                    passes[depth].append(self._piece(prompt - shared, _causal(prompt) - _causal(shared), 0))
                rest = (lengths.unique_tokens - prompt, lengths.unique_pairs - _causal(prompt), lengths.unique_scored)
                # Sequences that share nothing run first, like prompts.
                passes[depth + 1 if prompt else 0].append(self._piece(*rest))
        return [own for own in passes if own]

    def _piece(self, num_tokens: int, num_pairs: int, num_scored: int) -> Piece:
        model = self._costs.cost_model
        return Piece(num_tokens, model.cost((num_tokens, num_pairs, num_scored)) - model.per_micro_batch)


def _prompt(lengths: GroupLengths) -> int:
    """Tokens that all sequences of a group begin with."""
    return lengths.beginning_tokens


def _causal(num_tokens: int) -> int:
    return num_tokens * (num_tokens + 1) // 2


def _cost_of(passes: Iterable[Iterable[Piece]]) -> float:
    return sum(piece.cost for own in passes for piece in own)


def _chunks(passes: list[list[Piece]]) -> list[Piece]:
    """Every pass cut where a chunk is full; a piece that is cut costs in proportion."""
    chunks = []
    for own in passes:
        room, cost = CHUNK_TOKENS, 0.0
        for num_tokens, whole in own:
            left = num_tokens
            while left:
                taken = min(left, room)
                cost += whole * taken / num_tokens
                room, left = room - taken, left - taken
                if not room:
                    chunks.append(Piece(CHUNK_TOKENS, cost))
                    room, cost = CHUNK_TOKENS, 0.0
        if room < CHUNK_TOKENS:
            chunks.append(Piece(CHUNK_TOKENS - room, cost))
    return chunks


def _num_kept(chunks: Sequence[Piece]) -> float:
    """How many of the last chunks keep their graphs: those that together hold no more tokens than one chunk may.

    Infinite without chunks: such a rank keeps the graphs of its dummies, as many as others do.
    """
    if not chunks:
        return inf
    total = 0
    for number, chunk in enumerate(reversed(chunks)):
        total += chunk.num_tokens
        if total > CHUNK_TOKENS:
            return number
    return len(chunks)


def _backward(chunks: list[Piece], kept: float) -> list[float]:
    """Costs of backward passes, the last chunk first; those whose graphs are gone run forward once more."""
    costs = (chunk.cost for chunk in reversed(chunks))
    return [cost * (2 / 3 if number < kept else 1) for number, cost in enumerate(costs)]


def _with_passes(found: Played, num_passes: int, num_dummies: int) -> Played:
    return Played(**{**found.__dict__, "num_passes": num_passes, "num_dummies": num_dummies})
