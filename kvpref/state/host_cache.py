"""Keys and values in host memory, copied to the device layer by layer, just before each layer reads them.

Copies run in parallel to the computation, through a few buffers shared by all layers and chunks of a step. The host
waits for none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from kvpref.state.cache import KeyValue, LayerSlot
from kvpref.state.device_buffers import Buffer, carve
from kvpref.state.host_slabs import HostLayer
from kvpref.state.host_sums import HostSums
from kvpref.state.transfers import Transfers

Tensors = tuple[torch.Tensor, ...]


class HostPrefixes:
    """The keys and values in host memory that one chunk reads, and the gradients of its own.

    While a layer computes, the next one's are copied. The graph keeps no copy: autograd saves only a note (`pack`) to
    fetch them again (`unpack`).

    Args:
        transfers: The transfers of the step.
        reads: Per layer, the rows that it reads; empty if the chunk reads nothing.
        own: As in `HostSums`.
    """

    def __init__(
        self, transfers: Transfers, reads: Sequence[HostLayer], own: Callable[[], Sequence[HostLayer]] | None
    ) -> None:
        self.sums = HostSums(transfers, reads, own)
        self._transfers, self._reads = transfers, reads
        self._token = object()  # identifies the chunk in the buffers and keeps nothing alive
        self._last_layer = -1
        needs_grad = torch.is_grad_enabled() and any(rows.needs_grad for layer in reads for rows in layer)
        # In place of leaves, whose gradients autograd would collect.
        self._anchor = torch.empty(0, device=transfers.device, requires_grad=needs_grad)

    def slots(self, max_calls: int) -> list[LayerSlot]:
        """The chained slots of attention calls; starts the copy for the first one."""
        if self._reads:
            self._begin(0)
        chain = [LayerSlot((), None)]
        for layer in reversed(range(len(self._reads) or max_calls)):
            chain.append(HostSlot(self, layer, chain[-1]))
        return chain[:0:-1]

    def read(self, layer: int) -> tuple[KeyValue, ...]:
        """Keys and values of a layer on the device, in the graph."""
        if not self._reads:
            return ()
        tensors = _Bring.apply(self, layer, self._anchor)
        return tuple(zip(tensors[::2], tensors[1::2], strict=True))

    def copies(self, layer: int) -> Tensors:
        """A layer's keys and values on the device, valid until those of another layer are requested."""
        return tuple(self._carve(layer, self.bring(layer).memory))

    def bring(self, layer: int) -> Buffer:
        """The buffer with what a layer reads; starts the copy for the next layer."""
        # Upwards in the forward pass; downwards in the backward pass, which begins with the last layer.
        following = layer + 1 if layer > self._last_layer else layer - 1
        self._last_layer = layer
        buffers = self._transfers.key_values(self._reads)
        buffer = buffers.read((self._token, layer), partial(self._fill, layer))
        if 0 <= following < len(self._reads):
            self._begin(following)
        return buffer

    def _begin(self, layer: int) -> None:
        self._transfers.key_values(self._reads).begin((self._token, layer), partial(self._fill, layer))

    def constants(self, layer: int) -> list[bool]:
        """Which of a layer's keys and values get no gradient."""
        return [not rows.needs_grad for rows in self._reads[layer]]

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps of a saved tensor: a note, if its memory belongs to a buffer."""
        is_plain = type(tensor) is torch.Tensor  # weights may be of classes without storage
        buffer = self._transfers.key_values(self._reads).around(tensor) if is_plain else None
        if buffer is not None:
            return _Note(self, buffer, tensor)
        # An operator that saved its own result would keep itself alive, forever if no backward pass runs.
        return tensor if tensor.grad_fn is None else tensor.detach()

    def saving(self) -> AbstractContextManager[Any]:
        """While layers run, keeps autograd from holding on to the copies."""
        return saved_tensors_hooks(self.pack, self.unpack) if self._reads else nullcontext()

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        """The tensor that autograd saved."""
        tensor: torch.Tensor = packed.bring() if isinstance(packed, _Note) else packed
        return tensor

    def _fill(self, layer: int, memory: torch.Tensor) -> None:
        for rows, part in zip(self._reads[layer], self._carve(layer, memory), strict=True):
            part.copy_(rows.data, non_blocking=True)

    def _carve(self, layer: int, memory: torch.Tensor) -> list[torch.Tensor]:
        return carve(memory, [(rows.shape, rows.slab.data.dtype) for rows in self._reads[layer]])


class _Note:
    """Stands for a tensor in a buffer's memory, whole or a view, in autograd's graph."""

    def __init__(self, source: HostPrefixes, buffer: Buffer, tensor: torch.Tensor) -> None:
        _, self._layer = buffer.key
        self._source, self._dtype = source, tensor.dtype
        self._size, self._stride, self._offset = tensor.size(), tensor.stride(), tensor.storage_offset()

    def bring(self) -> torch.Tensor:
        memory = self._source.bring(self._layer).memory.view(self._dtype)
        return memory.as_strided(self._size, self._stride, self._offset).data


class HostSlot(LayerSlot):
    """A layer's slot whose keys and values are in host memory."""

    def __init__(self, source: HostPrefixes, layer: int, following: LayerSlot) -> None:
        super().__init__((), following)
        self._source, self._layer = source, layer
        self._edge: GradientEdge | None = None

    def read(self) -> tuple[KeyValue, ...]:
        return self._source.read(self._layer)

    def leave(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().leave(key, value)
        if key.requires_grad or value.requires_grad:
            # Created here and not after the pass: autograd runs the latest nodes first, and so takes up each layer's
            # gradients when it reaches the layer.
            self._edge = get_gradient_edge(_TakeUp.apply(self._source.sums, self._layer, key, value))

    def take_edge(self) -> GradientEdge | None:
        """Where the gradients of the layer's own keys and values enter the graph; None if there is no such place."""
        edge, self._edge = self._edge, None
        return edge


class _Bring(torch.autograd.Function):
    """A layer's keys and values on the device; their gradients are added up in host memory."""

    @staticmethod
    def forward(ctx: Any, source: HostPrefixes, layer: int, anchor: torch.Tensor) -> Tensors:
        ctx.sums, ctx.layer = source.sums, layer
        tensors = source.copies(layer)
        ctx.set_materialize_grads(False)
        constants = source.constants(layer)
        ctx.mark_non_differentiable(
            *(item for item, is_constant in zip(tensors, constants, strict=True) if is_constant)
        )
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, None, None]:
        ctx.sums.add(ctx.layer, grads)
        return None, None, None


class _TakeUp(torch.autograd.Function):
    """An end of the graph where the gradients of a layer's own keys and values arrive from host memory."""

    @staticmethod
    def forward(ctx: Any, sums: HostSums, layer: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.sums, ctx.layer = sums, layer
        return key.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *ctx.sums.take_up(ctx.layer)
