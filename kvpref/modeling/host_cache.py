"""Keys and values in host memory: brought to the device layer by layer, just before each layer reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from kvpref.modeling.cache import KeyValue, LayerSlot

Leaves = tuple[torch.Tensor, ...]


class _Copies(NamedTuple):
    """Copies of one layer's keys and values on the device, and what to wait for before they are there."""

    tensors: Leaves
    ready: torch.cuda.Event | None


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all chunks and steps: the allocator keeps freed memory for the stream that it was made on."""
    return torch.cuda.Stream(device)


class HostPrefixes:
    """The keys and values that one chunk reads, in host memory.

    While a layer computes, the next one's are copied on a stream of their own. The graph keeps no copy: what autograd
    would save of them (`pack`) is a note to bring them again (`unpack`), so the device holds those of two layers.

    Args:
        prefixes: Per layer, pairs of leaves in host memory, page-locked for CUDA.
        device: Where the model is.
    """

    def __init__(self, prefixes: Sequence[tuple[KeyValue, ...]], device: torch.device) -> None:
        self._leaves: list[Leaves] = [tuple(tensor for pair in pairs for tensor in pair) for pairs in prefixes]
        self._device = device
        self._stream = _copy_stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # what earlier chunks wrote to the host
        self._begun: dict[int, _Copies] = {}
        self._last_layer = -1
        # The copies that the current layer reads. They are held until the next layer reads its own, so that no other
        # tensor takes their memory and is mistaken for them.
        self._in_use: Leaves = ()
        self._in_use_layer = -1
        self._again: tuple[int, Leaves] = (-1, ())

    def slots(self) -> list[LayerSlot]:
        """The slots of the layers, chained."""
        chain = [LayerSlot((), None)]
        for layer in reversed(range(len(self._leaves))):
            chain.append(_HostSlot(self, layer, chain[-1]))
        return chain[:0:-1]

    def read(self, layer: int) -> tuple[KeyValue, ...]:
        """Keys and values of a layer on the device, in the graph of their leaves."""
        tensors = _Bring.apply(self, layer, *self._leaves[layer])
        self._in_use, self._in_use_layer = tuple(tensor.detach() for tensor in tensors), layer
        return tuple(zip(tensors[::2], tensors[1::2], strict=True))

    def copies(self, layer: int) -> Leaves:
        """A layer's keys and values on the device; those of the layer that comes next are begun."""
        step = 1 if layer >= self._last_layer else -1  # forward through the layers, and back in the backward pass
        self._last_layer = layer
        current = self._begun.pop(layer, None) or self._copy(layer)
        self._begun = {}
        if self._stream is not None and 0 <= layer + step < len(self._leaves):
            self._begun[layer + step] = self._copy(layer + step)
        if current.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(current.ready)
            for tensor in current.tensors:
                tensor.record_stream(stream)
        return current.tensors

    def _copy(self, layer: int) -> _Copies:
        if self._stream is None:
            return _Copies(tuple(leaf.detach().to(self._device, copy=True) for leaf in self._leaves[layer]), None)
        with torch.cuda.stream(self._stream):
            tensors = tuple(leaf.detach().to(self._device, non_blocking=True) for leaf in self._leaves[layer])
            return _Copies(tensors, self._stream.record_event())

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps of a tensor that it saves: a note, if it is one of the copies in use."""
        for place, copy in enumerate(self._in_use):
            if tensor.data_ptr() == copy.data_ptr() and tensor.shape == copy.shape:
                return _Note(self, self._in_use_layer, place)
        return tensor

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        """The tensor that autograd saved."""
        tensor: torch.Tensor = packed.bring() if isinstance(packed, _Note) else packed
        return tensor

    def again(self, layer: int, place: int) -> torch.Tensor:
        """One of a layer's copies for the backward pass; they are brought together and handed out one by one."""
        if self._again[0] != layer:
            self._in_use = ()  # the forward pass is over
            self._again = (layer, self.copies(layer))
        return self._again[1][place]


class _Note:
    """Stands for a copy in autograd's graph."""

    def __init__(self, source: HostPrefixes, layer: int, place: int) -> None:
        self._source, self._layer, self._place = source, layer, place

    def bring(self) -> torch.Tensor:
        return self._source.again(self._layer, self._place)


class _HostSlot(LayerSlot):
    """A layer's slot whose keys and values are in host memory."""

    def __init__(self, source: HostPrefixes, layer: int, following: LayerSlot) -> None:
        super().__init__((), following)
        self._source, self._layer = source, layer

    def read(self) -> tuple[KeyValue, ...]:
        return self._source.read(self._layer)


class _Bring(torch.autograd.Function):
    """Copies of leaves on the device; their gradients go back to the host."""

    @staticmethod
    def forward(ctx: Any, source: HostPrefixes, layer: int, *leaves: torch.Tensor) -> Leaves:
        ctx.host = leaves[0].device
        return source.copies(layer)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(None if grad is None else grad.to(ctx.host) for grad in grads)
