"""Features of images: what a vision tower leaves for the passes that read it.

Shape legend: R rows, one per placeholder; M rows that a pass reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch.autograd.graph import GradientEdge

from kvpref.tracing import mark


class FeatureSource(Protocol):
    """Where passes get features from."""

    @property
    def num_tensors(self) -> int:
        """The features, and the deepstack features of each layer."""

    def rows(self, number: int, index: torch.Tensor) -> torch.Tensor:
        """Some rows of one of the tensors, (M, hidden_size).

        Args:
            number: 0 for the features, from 1 on for the deepstack features of a layer.
            index: (M,) int64.
        """


class ImageFeatures(NamedTuple):
    """The outputs of tower and projector for images.

    Attributes:
        features: (R, hidden_size), in place of embeddings.
        deepstack: (R, hidden_size) each, added to the hidden states of the first layers, one per layer.
    """

    features: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()

    @property
    def num_tensors(self) -> int:
        return 1 + len(self.deepstack)

    def rows(self, number: int, index: torch.Tensor) -> torch.Tensor:
        return (self.features, *self.deepstack)[number].index_select(0, index)


class FeatureTable:
    """Features of a step's images without their graphs, and the gradients that their readers leave.

    Args:
        num_rows: R, the number of feature rows.

    Attributes:
        requires_grad: Whether gradients are wanted.
    """

    def __init__(self, num_rows: int) -> None:
        self.requires_grad = False
        self._num_rows = num_rows
        self._data: list[torch.Tensor] = []
        self._grads: dict[int, torch.Tensor] = {}

    @property
    def num_tensors(self) -> int:
        return len(self._data)

    def write(self, start: int, made: ImageFeatures) -> None:
        """Put features in the rows from `start` on."""
        tensors = (made.features, *made.deepstack)
        if not self._data:
            self._data = [tensor.new_empty((self._num_rows, *tensor.shape[1:])) for tensor in tensors]
            mark("image features", *self._data)
        for data, tensor in zip(self._data, tensors, strict=True):
            data[start : start + len(tensor)] = tensor.detach()

    def rows(self, number: int, index: torch.Tensor) -> torch.Tensor:
        """As in `FeatureSource`; a leaf whose gradient is added to the table's as soon as it arrives."""
        leaf = self._data[number].index_select(0, index)
        if self.requires_grad and torch.is_grad_enabled():
            leaf.requires_grad_()
            leaf.register_post_accumulate_grad_hook(lambda tensor: self._take(number, index, tensor))
        return leaf

    def _take(self, number: int, index: torch.Tensor, leaf: torch.Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        # Many passes add to the same rows; 16-bit sums would lose what each of them adds.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if number not in self._grads:
            self._grads[number] = wide.new_zeros(self._data[number].shape)
            mark("image feature gradients", self._grads[number])
        self._grads[number].index_add_(0, index, wide)

    @property
    def has_grads(self) -> bool:
        """Whether any pass left gradients."""
        return bool(self._grads)

    def roots(
        self, start: int, stop: int, edges: tuple[GradientEdge | None, ...]
    ) -> Iterator[tuple[GradientEdge, torch.Tensor]]:
        """Where the gradients of the rows [start, stop) enter the graph that made them.

        Args:
            start: First row.
            stop: One past the last row.
            edges: The edge of each tensor; None for one without a graph.
        """
        for number, edge in enumerate(edges):
            if edge is not None and number in self._grads:
                yield edge, self._grads[number][start:stop].to(self._data[number].dtype)
