"""One slab on the device."""

from __future__ import annotations

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kvpref.tracing import mark


class Slab:
    """One tensor of keys, values or recurrent states, and its gradient.

    Args:
        num_rows: Number of rows.
        like: A tensor of the kind it will hold, with any number of rows.
    """

    def __init__(self, num_rows: int, like: torch.Tensor) -> None:
        self.data = torch.empty((num_rows, *like.shape[1:]), dtype=like.dtype, device=like.device)
        self.grad: torch.Tensor | None = None
        mark("prefix K/V", self.data)

    def leaf(self, start: int, stop: int, *, requires_grad: bool) -> torch.Tensor:
        """A view of rows as a leaf; its gradients go to `grad` as soon as they arrive."""
        # `.data` has its own version counter: graphs stay valid while other rows are written.
        leaf = self.data.data[start:stop].requires_grad_(requires_grad)
        if requires_grad:
            leaf.register_post_accumulate_grad_hook(lambda tensor: self._take(tensor, start, stop))
        return leaf

    def _take(self, leaf: torch.Tensor, start: int, stop: int) -> None:
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        if self.grad is None:
            # Many chunks add to the same rows; 16-bit sums would lose what each of them adds.
            wide = torch.promote_types(grad.dtype, torch.float32)
            if wide == grad.dtype and grad.shape == self.data.shape:
                self.grad = grad
            else:
                self.grad = torch.zeros(self.data.shape, dtype=wide, device=self.data.device)
            mark("prefix K/V gradients", self.grad)
        if self.grad is not grad:
            self.grad[start:stop].add_(grad)


def edge_of(tensor: torch.Tensor) -> GradientEdge | None:
    """Where a gradient of the tensor enters its graph; None if it has no graph."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None
