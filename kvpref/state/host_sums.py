"""Gradients of keys and values in host memory: the device adds to their sums layer by layer.

A layer's sums are copied up while the layer above computes, added to, and copied back; so nothing waits, and the host
does no additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import torch
from torch.autograd.graph import GradientEdge

from kvpref.state.device_buffers import carve
from kvpref.state.host_slabs import HostLayer, HostRows
from kvpref.state.transfers import Transfers


class HostSums:
    """The sums that the backward pass of one chunk adds to and takes up, layer by layer from the last.

    Args:
        transfers: The transfers of the step.
        reads: Per layer, the rows that it reads; gradients are added to their sums.
        own: Called in the backward pass: per layer, the rows of the chunk's own keys and values, whose gradients it
            takes up.
    """

    def __init__(
        self, transfers: Transfers, reads: Sequence[HostLayer], own: Callable[[], Sequence[HostLayer]] | None
    ) -> None:
        self._transfers, self._reads, self._make_own = transfers, reads, own
        self._token = object()  # identifies the chunk in the buffers and keeps nothing alive

    @cached_property
    def own(self) -> Sequence[HostLayer]:
        """Per layer, keys and values of the chunk itself."""
        return () if self._make_own is None else self._make_own()

    @cached_property
    def _layers(self) -> Sequence[HostLayer]:
        """Per layer, the rows that it reads, followed by its own."""
        if not self._reads or not self.own:
            return self._reads or self.own
        return [(*read, *own) for read, own in zip(self._reads, self.own, strict=True)]

    def add(self, layer: int, grads: Sequence[torch.Tensor | None]) -> None:
        """Add the gradients of what a layer read."""
        parts, exist = self._bring(layer)
        taken: list[tuple[HostRows, torch.Tensor]] = []
        for rows, grad, part, exists in zip(self._reads[layer], grads, parts, exist, strict=False):
            if grad is not None:
                part.add_(grad) if exists else part.copy_(grad)
                taken.append((rows, part))
        targets = [rows.make_sums() for rows, _ in taken]
        lanes = self._transfers.lanes
        lanes.down.wait(lanes.compute.record())
        with lanes.down.running():
            for target, (_, part) in zip(targets, taken, strict=True):
                target.copy_(part, non_blocking=True)

    def take_up(self, layer: int) -> tuple[torch.Tensor | None, ...]:
        """The gradients that others left for a layer's own keys and values."""
        parts, exist = self._bring(layer)
        # Copies: autograd may hold them until the buffer is reused.
        return tuple(
            part.to(rows.slab.data.dtype, copy=True) if exists else None
            for rows, part, exists in zip(self.own[layer], parts[-2:], exist[-2:], strict=True)
        )

    def incoming(self, edges: Sequence[GradientEdge | None]) -> Iterator[tuple[GradientEdge, torch.Tensor]]:
        """For each layer with gradients from others, the node that calls `take_up`, and the value to pass in there."""
        for edge, rows in zip(edges, self.own, strict=True):
            if edge is not None and any(item.slab.sums is not None for item in rows):
                yield edge, torch.empty(0, dtype=rows[0].slab.data.dtype, device=self._transfers.device)

    def _bring(self, layer: int) -> tuple[list[torch.Tensor], list[bool]]:
        """A layer's sums on the device, and which of them exist; starts the copy for the layer below."""
        buffers = self._transfers.sums(self._layers)
        buffer = buffers.read((self._token, layer), partial(self._fill, layer))
        if layer:
            buffers.begin((self._token, layer - 1), partial(self._fill, layer - 1))
        return self._carve(layer, buffer.memory), buffer.content

    def _fill(self, layer: int, memory: torch.Tensor) -> list[bool]:
        sums = [rows.sums for rows in self._layers[layer]]
        for total, part in zip(sums, self._carve(layer, memory), strict=True):
            if total is not None:
                part.copy_(total, non_blocking=True)
        return [total is not None for total in sums]

    def _carve(self, layer: int, memory: torch.Tensor) -> list[torch.Tensor]:
        return carve(memory, [(rows.shape, rows.slab.wide) for rows in self._layers[layer]])
