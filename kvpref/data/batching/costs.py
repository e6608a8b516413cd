"""What a micro-batch computes in each mode, and what that costs.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal, TypedDict

from kvpref.data.batching.lengths import GroupLengths
from kvpref.errors import InputError

if TYPE_CHECKING:
    from kvpref.plan.flops import ModelShape, Work

_REACH = {"window": 1.0, "chunk": 0.5}
"""Largest average share of a window or chunk that a token sees."""

Mode = Literal["two_pass", "one_pass", "packed", "padded"]
"""How a micro-batch runs; see `kvpref.response_logps`."""

Counts = tuple[int, int, int]
"""Tokens that run through the layers, attention pairs, and scored rows: the fields of `kvpref.plan.flops.Work`."""


def _shared(lengths: GroupLengths) -> Counts:
    return lengths.unique_tokens, lengths.unique_pairs, lengths.unique_scored


def _unshared(lengths: GroupLengths) -> Counts:
    return lengths.total_tokens, lengths.total_pairs, lengths.total_scored


def _padded(lengths: GroupLengths) -> Counts:
    width = lengths.max_sequence_tokens
    slots = lengths.num_sequences * width
    return slots, slots * width, lengths.total_scored


COUNTS: dict[str, Callable[[GroupLengths], Counts]] = {
    "two_pass": _shared,
    "one_pass": _shared,
    "packed": _unshared,
    "padded": _padded,
}
"""What the model computes for a micro-batch in each mode, given its combined lengths."""


SHARING_MODES = frozenset(mode for mode, counts in COUNTS.items() if counts is _shared)
"""The modes that encode a shared beginning once, even if several groups of a micro-batch share it."""


class PairWeights(TypedDict):
    """The weights of a cost model for query-key pairs."""

    per_pair: float
    reaching: tuple[ReachCost, ...]


def work_of(lengths: GroupLengths, mode: Mode) -> Work:
    """What one forward and backward over groups of these lengths computes in `mode`, padding included."""
    from kvpref.plan.flops import Work  # imports torch, which planning does not need

    return Work(*COUNTS[mode](lengths))


@dataclass(frozen=True, kw_only=True)
class ReachCost:
    """The cost of attention layers in which a token sees a limited number of others."""

    reach: float
    """Query-key pairs per token: all of a window, half of a chunk."""

    per_pair: float
    """Cost of one query-key pair, over all heads and these layers."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The cost of a micro-batch's forward and backward: a weighted sum of its counts.

    The default counts tokens, all that is known without a model.

    Raises:
        InputError: If a weight is negative or not finite, or all are zero.
    """

    per_token: float = 1.0
    """Cost of one token that runs through the layers, including padding."""

    per_pair: float = 0.0
    """Cost of one query-key pair of causal attention, over all heads and the layers that see all earlier tokens."""

    per_scored: float = 0.0
    """Cost of one row that the LM head turns into a log-prob."""

    per_micro_batch: float = 0.0
    """Fixed cost of every micro-batch."""

    reaching: tuple[ReachCost, ...] = ()
    """Costs of the attention layers that see less. Their pairs are bounded, not counted: at most those of causal
    attention, and at most `reach` per token."""

    unit: str = "tokens"
    """The unit of costs: ``tokens``, ``FLOPs`` or ``seconds``."""

    def __post_init__(self) -> None:
        reaching = (number for kind in self.reaching for number in (kind.reach, kind.per_pair))
        weights = (self.per_token, self.per_pair, self.per_scored, self.per_micro_batch, *reaching)
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise InputError(f"the weights of a cost model must be finite, at least 0 and not all 0; got {weights}")

    @classmethod
    def from_shape(cls, shape: ModelShape, mode: str = "two_pass") -> CostModel:
        """Costs in FLOPs; see `ModelShape.flops`. They compare micro-batches but do not say how long one takes."""
        from kvpref.plan.flops import Work  # loaded already, since `shape` comes from there

        nothing = tuple((rule, 0) for rule in shape.rules)
        per_token, per_scored = (float(shape.flops(Work(*counts, nothing)).total) for counts in ((1, 0, 0), (0, 0, 1)))
        weights = pair_weights(shape, float(sum(kind.pair_flops for kind in shape.attention)), mode)
        return cls(per_token=per_token, per_scored=per_scored, unit="FLOPs", **weights)

    def cost(self, counts: Counts) -> float:
        """Cost of one micro-batch, in `unit`; takes a `kvpref.plan.flops.Work` too."""
        num_tokens, num_pairs, num_scored = counts[:3]
        return (
            self.per_token * num_tokens
            + self.per_pair * num_pairs
            + sum(kind.per_pair * min(num_pairs, kind.reach * num_tokens) for kind in self.reaching)
            + self.per_scored * num_scored
            + self.per_micro_batch
        )


def pair_weights(shape: ModelShape, per_pair: float, mode: str) -> PairWeights:
    """Spread the cost of a query-key pair in all attention layers over those that see all and those that see less.

    Args:
        shape: The model's shape.
        per_pair: Cost of a pair that all layers compute.
        mode: In ``padded``, layers also compute what they mask.
    """
    total = sum(kind.pair_flops for kind in shape.attention)
    costs: dict[float, float] = {}
    for kind in shape.attention:
        share = None if mode == "padded" else _REACH.get(kind.rule.kind)
        reach = inf if share is None else share * kind.rule.size
        costs[reach] = costs.get(reach, 0.0) + per_pair * kind.pair_flops / total
    reaching = tuple(ReachCost(reach=reach, per_pair=cost) for reach, cost in costs.items() if reach < inf)
    return {"per_pair": costs.get(inf, 0.0), "reaching": reaching}
