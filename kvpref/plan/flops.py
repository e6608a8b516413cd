"""What one forward and backward computes, counted exactly: tokens, attention pairs, scored tokens, and FLOPs.

Every speed-up that kvpref reports stands beside its ideal, the ratio of these counts. One multiply-add is two FLOPs;
norms, activations, softmax and the optimizer are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kvpref.plan.passes import ModePlan, PassPlan


class Work(NamedTuple):
    """Counts of one micro-batch that do not depend on the model; they add up over micro-batches."""

    num_tokens: int
    """Tokens that run through the layers, padding included."""

    num_pairs: int
    """Query-key pairs that attention computes, per head and layer."""

    num_scored: int
    """Rows that the LM head turns into a log-prob."""

    def plus(self, other: Work) -> Work:
        """The counts of both together."""
        return Work(*(first + second for first, second in zip(self, other, strict=True)))


class Flops(NamedTuple):
    """FLOPs of one forward and backward."""

    linear: int
    """Linear layers of the blocks."""

    attention: int
    """Query-key and probability-value products."""

    head: int
    """The LM head."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.head


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that decide a model's FLOPs."""

    linear_weights: int
    """Weights of the linear layers that every token runs through, over all layers."""

    num_layers: int
    """Attention layers."""

    num_heads: int
    """Query heads per layer."""

    head_dim: int
    """Elements per head."""

    hidden_size: int
    """Elements of a hidden state."""

    vocab_size: int
    """Rows of the LM head."""

    def flops(self, work: Work) -> Flops:
        """FLOPs of a forward and backward that trains every weight.

        A linear layer costs one product forward and two backward. Attention costs two forward and five backward
        (scores again, dV, dP, dQ, dK; Dao 2023, arXiv 2307.08691). The head costs one forward and three backward,
        because its logits are computed again (Wijmans et al. 2024, arXiv 2411.09009).
        """
        return Flops(
            linear=3 * 2 * self.linear_weights * work.num_tokens,
            attention=7 * 2 * self.num_heads * self.head_dim * self.num_layers * work.num_pairs,
            head=4 * 2 * self.vocab_size * self.hidden_size * work.num_scored,
        )


def count_work(plan: ModePlan) -> Work:
    """Count what running `plan` computes. In mode ``padded`` attention computes the masked half and the padding too."""
    return Work(
        num_tokens=plan.num_forward_tokens,
        num_pairs=sum(map(_num_pairs, plan.passes)),
        num_scored=len(plan.targets),
    )


def total_work(works: Iterable[Work]) -> Work:
    """The counts of several micro-batches together."""
    total = Work(0, 0, 0)
    for work in works:
        total = total.plus(work)
    return total


def _num_pairs(item: PassPlan) -> int:
    if not item.levels:
        num_rows, width = item.input_ids.shape
        return num_rows * width * width
    return sum(block.num_attended_pairs for level in item.levels for block in level.blocks)
