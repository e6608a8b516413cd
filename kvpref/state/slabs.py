"""Slabs: the keys and values that chunks of the bounded schedule leave for one another, and their gradients.

Each key and value is stored once, in one slab. A chunk reads views of the slabs as leaves of its own autograd graph;
the gradients there are summed, in fp32 or wider, until the chunk that made those rows takes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from kvpref.plan.chunks import ChunkPlan, SlabSlice, StepChunks
from kvpref.prefix.slab_reads import SlabKey
from kvpref.state.cache import KeyValue, LayerSlot, chain_slots
from kvpref.state.host_cache import HostPrefixes, HostSlot
from kvpref.state.host_slabs import HostLayer, HostRows, HostSlab
from kvpref.state.recurrent import ChunkRecurrent, Incoming, RecurrentSlabs
from kvpref.state.slab import Slab, edge_of
from kvpref.state.transfers import Transfers


class SlabStore:
    """All slabs of one optimizer step.

    Attributes:
        modules: The attention modules in running order, once known.
        recurrent: The states that mixers leave; always on the device, because they are small.

    Args:
        chunks: The chunks that will run.
        device: The model's device.
        on_host: Whether to keep keys and values in host memory.
        prompts_get_grad: Whether slabs of prompts collect gradients.
    """

    def __init__(self, chunks: StepChunks, device: torch.device, *, on_host: bool, prompts_get_grad: bool) -> None:
        self._transfers = Transfers(device, chunks.all) if on_host else None
        self.modules: list[nn.Module | None] | None = None
        self._slab_rows, self._prompts_get_grad = chunks.slab_rows, prompts_get_grad
        self._make: type[Slab] | type[HostSlab] = HostSlab if on_host else Slab
        self._slabs: dict[SlabKey, list[tuple[Any, Any]]] = {}
        self.recurrent = RecurrentSlabs(chunks.slab_states, prompts_get_grad=prompts_get_grad)

    def key_values(self, chunk: ChunkPlan) -> ChunkKeyValues:
        """The keys and values that a chunk reads here and leaves."""
        if self._transfers is None:
            return ChunkKeyValues(self, chunk)
        return HostChunkKeyValues(self, chunk, self._transfers)

    def write(self, place: SlabSlice, own: Sequence[KeyValue]) -> None:
        """Copy a chunk's keys and values, one pair per layer, to their rows."""
        if place.slab not in self._slabs:
            num_rows = self._slab_rows[place.slab]
            self._slabs[place.slab] = [(self._make(num_rows, key), self._make(num_rows, value)) for key, value in own]
        for slabs, pair in zip(self._slabs[place.slab], own, strict=True):
            for slab, tensor in zip(slabs, pair, strict=True):
                slab.data[place.start : place.stop].copy_(tensor.detach(), non_blocking=True)

    def leaves(self, place: SlabSlice) -> list[KeyValue]:
        """Per layer, views of rows whose gradients are collected here."""
        needs_grad = torch.is_grad_enabled() and self._collects(place)
        return [
            (
                key.leaf(place.start, place.stop, requires_grad=needs_grad),
                value.leaf(place.start, place.stop, requires_grad=needs_grad),
            )
            for key, value in self._slabs[place.slab]
        ]

    def grads(self, place: SlabSlice) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Per layer, the gradients of rows collected so far; None where there is none."""
        return [
            tuple(None if slab.grad is None else slab.grad[place.start : place.stop] for slab in pair)  # type: ignore[misc]
            for pair in self._slabs[place.slab]
        ]

    def host_rows(self, place: SlabSlice) -> list[HostLayer]:
        """Per layer, rows of slabs in host memory."""
        needs_grad = self._collects(place)
        return [
            tuple(HostRows(slab, place.start, place.stop, needs_grad) for slab in pair)
            for pair in self._slabs[place.slab]
        ]

    def _collects(self, place: SlabSlice) -> bool:
        return self._prompts_get_grad or not place.slab.is_prompt

    def drop(self, owner: int) -> None:
        """Free the slabs of an owner."""
        for key in [key for key in self._slabs if key.owner == owner]:
            del self._slabs[key]
        self.recurrent.drop(owner)

    def close(self) -> None:
        """Free the device memory used to copy slabs there."""
        if self._transfers is not None:
            self._transfers.close()


class ChunkKeyValues:
    """What one chunk reads and leaves, for `RunningPass`; keys and values stay on the device.

    Attributes:
        own: After the pass, the keys and values of the chunk, one pair per layer.
        recurrent: The states that its mixers start from and leave.
    """

    def __init__(self, store: SlabStore, chunk: ChunkPlan) -> None:
        self.own: list[KeyValue] = []
        self.recurrent = ChunkRecurrent(store.recurrent, chunk)
        self._store, self._writes = store, chunk.writes
        self._prefixes: list[tuple[KeyValue, ...]] = list(
            zip(*(store.leaves(place) for place in chunk.reads), strict=True)
        )

    def slots(self, max_calls: int) -> list[LayerSlot]:
        """The slots of the chunk's layers, chained."""
        return chain_slots(self._prefixes or [()] * max_calls)

    def same_layers(self, slots: Sequence[LayerSlot]) -> bool:
        """Whether the layers of the first chunk took these slots, in the same order."""
        modules = [slot.module for slot in slots]
        self._store.modules = self._store.modules or modules
        return modules == self._store.modules

    def saving(self) -> AbstractContextManager[Any]:
        """While layers run, decides what happens to the tensors that autograd saves."""
        return nullcontext()

    def record(self, slots: Sequence[LayerSlot]) -> None:
        """Take the keys and values out of the slots, which recomputation may keep alive."""
        for slot in slots:
            assert slot.own is not None
            self.own.append(slot.own)
            slot.own = None

    def incoming(self) -> Incoming:
        """A callable for the gradients that others will have left for the chunk's keys and values, which are forgotten.

        Only the callable may refer to their graph: the graph may hold this object, to recompute layers.
        """
        edges = [(edge_of(key), edge_of(value)) for key, value in self.own]
        self.own = []
        assert self._writes is not None
        return partial(_incoming, self._store, self._writes, edges)


class HostChunkKeyValues(ChunkKeyValues):
    """The same with keys and values in host memory."""

    def __init__(self, store: SlabStore, chunk: ChunkPlan, transfers: Transfers) -> None:
        self.own = []
        self.recurrent = ChunkRecurrent(store.recurrent, chunk)
        self._store = store
        layers = zip(*(store.host_rows(place) for place in chunk.reads), strict=True)
        reads = [tuple(rows for pair in pairs for rows in pair) for pairs in layers]
        own = None if chunk.writes is None else partial(store.host_rows, chunk.writes)
        self._host = HostPrefixes(transfers, reads, own)
        self._edges: list[GradientEdge | None] = []

    def slots(self, max_calls: int) -> list[LayerSlot]:
        return list(self._host.slots(max_calls))

    def saving(self) -> AbstractContextManager[Any]:
        return self._host.saving()

    def record(self, slots: Sequence[LayerSlot]) -> None:
        super().record(slots)
        self._edges = [slot.take_edge() for slot in slots if isinstance(slot, HostSlot)]

    def incoming(self) -> Incoming:
        edges, self._edges, self.own = self._edges, [], []
        return partial(self._host.sums.incoming, edges)


def _incoming(
    store: SlabStore, place: SlabSlice, edges: Sequence[tuple[GradientEdge | None, GradientEdge | None]]
) -> Iterator[tuple[GradientEdge, torch.Tensor]]:
    for pair, grads in zip(edges, store.grads(place), strict=True):
        for edge, grad in zip(pair, grads, strict=True):
            # With an adapter only on the queries, the first layer's keys and values have no graph.
            if edge is not None and grad is not None:
                yield edge, grad
