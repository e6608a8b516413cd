"""What one forward and backward computes, counted exactly: tokens, attention pairs, scored tokens, and FLOPs.

Every speed-up that kvpref reports stands beside its ideal, the ratio of these counts. One multiply-add is two FLOPs;
norms, activations, softmax and the optimizer are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from operator import mul
from typing import NamedTuple

from kvpref.plan.passes import ModePlan, PassPlan
from kvpref.prefix.rules import CAUSAL, Rule


class Work(NamedTuple):
    """Counts of one micro-batch that do not depend on the model's sizes; they add up over micro-batches."""

    num_tokens: int
    """Tokens that run through the layers, padding included."""

    num_pairs: int
    """Query-key pairs that attention computes, per head and layer, where layers see all earlier tokens."""

    num_scored: int
    """Rows that the LM head turns into a log-prob."""

    ruled_pairs: tuple[tuple[Rule, int], ...] = ()
    """The same count for layers under each of the other requested rules."""

    def pairs_under(self, rule: Rule) -> int:
        """Query-key pairs of layers of a rule.

        Raises:
            KeyError: If the pairs of this rule were not counted.
        """
        return self.num_pairs if rule == CAUSAL else dict(self.ruled_pairs)[rule]

    def plus(self, other: Work) -> Work:
        """The sum of both counts."""
        ruled = Counter(dict(self.ruled_pairs))
        ruled.update(dict(other.ruled_pairs))
        return Work(
            self.num_tokens + other.num_tokens,
            self.num_pairs + other.num_pairs,
            self.num_scored + other.num_scored,
            tuple(ruled.items()),
        )


class Flops(NamedTuple):
    """FLOPs of one forward and backward."""

    linear: int
    """FLOPs of the linear layers inside the blocks."""

    attention: int
    """FLOPs of the query-key and probability-value products."""

    head: int
    """FLOPs of the LM head."""

    recurrent: int = 0
    """FLOPs of recurrences and convolutions along the sequence."""

    vision: int = 0
    """FLOPs of the vision tower and projector, counted by running them (`kvpref.models.vision.flops`)."""

    @property
    def total(self) -> int:
        """FLOPs of all parts."""
        return sum(self)


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The sizes of attention layers of one kind."""

    num_layers: int = 1
    """Number of such layers."""

    num_heads: int
    """Query heads per layer."""

    num_kv_heads: int
    """Key/value heads per layer."""

    head_dim: int
    """Size of a query or key per head."""

    value_dim: int
    """Size of a value per head."""

    rule: Rule = CAUSAL
    """Which tokens a token sees in them."""

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query-key pair, forward and backward, over all heads and layers.

        Two products forward and five backward: scores again, dV, dP, dQ, dK (Dao 2023, arXiv 2307.08691). Four of them
        have the size of a key, three that of a value.
        """
        return 2 * (4 * self.head_dim + 3 * self.value_dim) * self.num_heads * self.num_layers

    @property
    def kv_elements(self) -> int:
        """Numbers in the keys and values of one token, over these layers."""
        return self.num_layers * self.num_kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that decide a model's FLOPs."""

    linear_weights: int
    """Weights of the linear layers that a token runs through, in all layers; of experts, only those it is routed to."""

    attention: tuple[AttentionShape, ...]
    """Attention layers, by kind."""

    hidden_size: int

    vocab_size: int
    """Rows of the LM head."""

    recurrent_flops: int = 0
    """FLOPs per token of recurrences and convolutions along the sequence, forward, over all layers."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The distinct rules of the attention layers."""
        return tuple({kind.rule: None for kind in self.attention})

    @property
    def kv_elements(self) -> int:
        """Numbers in the keys and values of one token, over all layers."""
        return sum(kind.kv_elements for kind in self.attention)

    def mean_pairs(self, work: Work) -> float:
        """Query-key pairs per head and layer, averaged over all layers and weighted by the size of the heads."""
        weights = [kind.pair_flops for kind in self.attention]
        pairs = [work.pairs_under(kind.rule) for kind in self.attention]
        return sum(map(mul, weights, pairs)) / max(1, sum(weights))

    def flops(self, work: Work) -> Flops:
        """FLOPs of a forward and backward that trains every weight.

        A linear layer costs one product forward and two backward; recurrences are counted the same. The head costs one
        forward and three backward, because its logits are computed again (Wijmans et al. 2024, arXiv 2411.09009).

        Args:
            work: Counts that include the rules of this shape.
        """
        return Flops(
            linear=3 * 2 * self.linear_weights * work.num_tokens,
            attention=sum(kind.pair_flops * work.pairs_under(kind.rule) for kind in self.attention),
            head=4 * 2 * self.vocab_size * self.hidden_size * work.num_scored,
            recurrent=3 * self.recurrent_flops * work.num_tokens,
        )


def count_work(plan: ModePlan, rules: Iterable[Rule] = ()) -> Work:
    """Count the work of running `plan`. In mode ``padded`` this includes masked pairs and padding.

    Args:
        plan: The passes to run.
        rules: Rules of the model's layers other than causal.
    """
    return Work(
        num_tokens=plan.num_forward_tokens,
        num_pairs=_num_pairs(plan, CAUSAL),
        num_scored=len(plan.targets),
        ruled_pairs=tuple((rule, _num_pairs(plan, rule)) for rule in rules if rule != CAUSAL),
    )


def total_work(works: Iterable[Work]) -> Work:
    """The sum of the counts of several micro-batches."""
    total = Work(0, 0, 0)
    for work in works:
        total = total.plus(work)
    return total


def _num_pairs(plan: ModePlan, rule: Rule) -> int:
    return sum(_pass_pairs(item, rule) for item in plan.passes)


def _pass_pairs(item: PassPlan, rule: Rule) -> int:
    if not item.levels:
        num_rows, width = item.input_ids.shape
        return num_rows * width * width
    return sum(block.num_attended_pairs for level in item.levels_under(rule) for block in level.blocks)
