"""The load-balancing loss of a step that runs chunk by chunk.

The first run of the chunks leaves the sums that make up a micro-batch's loss. The loss's gradient with respect to
the sums of router probabilities is then known, and each chunk's backward pass starts from its own share of these sums
with that gradient; f, the experts' shares of rows, has none. So the gradient equals that of the whole, up to rounding.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kvpref.models.experts import RouterSums
from kvpref.plan.chunks import ChunkPlan


class StepBalance:
    """Accumulates the load-balancing losses of a step's micro-batches.

    Args:
        num_micro_batches: Micro-batches of the step.
    """

    def __init__(self, num_micro_batches: int) -> None:
        self._num_micro_batches = num_micro_batches
        self._sums: RouterSums | None = None
        self._leaves: dict[int, torch.Tensor] = {}

    def add(self, chunk: ChunkPlan, sums: RouterSums) -> None:
        """Add the sums of a chunk's first run."""
        if self._sums is None:
            self._sums = RouterSums(*(total.new_zeros(self._num_micro_batches, *total.shape[1:]) for total in sums))
        owners = list(chunk.occurrences.owners)
        for total, share in zip(self._sums, sums, strict=True):
            total[owners] += share.detach()

    def loss(self, index: int) -> torch.Tensor:
        """The loss of a micro-batch whose chunks have all run, made from a leaf that will receive its gradient."""
        assert self._sums is not None
        sums = RouterSums(*(total[index : index + 1] for total in self._sums))
        leaf = self._leaves[index] = sums.probabilities.clone().requires_grad_()
        return sums._replace(probabilities=leaf).balance_losses().squeeze(0)

    def roots(self, chunk: ChunkPlan, sums: RouterSums) -> tuple[GradientEdge, torch.Tensor]:
        """Where the backward pass of a chunk starts, and with what gradient."""
        grads = [self._leaves[owner].grad for owner in chunk.occurrences.owners]
        zero = torch.zeros_like(sums.probabilities[:1])
        found = torch.cat([zero if grad is None else grad for grad in grads])
        return get_gradient_edge(sums.probabilities), found
