"""Slabs: the keys and values that chunks of the bounded schedule leave for one another, and the gradients they get.

Each key and value stands in one slab, once. A chunk reads views of the slabs as leaves of its own autograd graph; what
its backward pass leaves there is added up, in fp32 or wider, until the chunk that made those rows takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from kvpref.chunk_plans import ChunkPlan, SlabSlice
from kvpref.chunks import SlabKey
from kvpref.modeling.cache import KeyValue, LayerSlot, chain_slots
from kvpref.modeling.host_cache import HostPrefixes
from kvpref.regions import mark


class Slab:
    """One tensor of keys or values, (rows, num_kv_heads, head_dim), and its gradient.

    Args:
        num_rows: Rows.
        like: (any, num_kv_heads, head_dim), what it will hold: its dtype and, unless `on_host`, its device.
        on_host: Keep it in host memory, page-locked where the model is on CUDA.
    """

    def __init__(self, num_rows: int, like: torch.Tensor, *, on_host: bool) -> None:
        shape = (num_rows, *like.shape[1:])
        if on_host:
            self.data = torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
        else:
            self.data = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.grad: torch.Tensor | None = None
        mark("prefix K/V", self.data)

    def leaf(self, start: int, stop: int, *, requires_grad: bool) -> torch.Tensor:
        """A view of rows as a leaf; its gradients go to `grad` as soon as they are there."""
        # `.data` has a version counter of its own: graphs may go on while other rows are written.
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


class SlabStore:
    """All slabs of one optimizer step.

    Args:
        slab_rows: Rows of each slab.
        on_host: Keep keys and values in host memory.
        prompts_get_grad: Whether slabs of prompts collect gradients.
    """

    def __init__(self, slab_rows: Mapping[SlabKey, int], *, on_host: bool, prompts_get_grad: bool) -> None:
        self.on_host = on_host
        self.modules: list[nn.Module | None] | None = None
        self._slab_rows, self._prompts_get_grad = slab_rows, prompts_get_grad
        self._slabs: dict[SlabKey, list[tuple[Slab, Slab]]] = {}

    def write(self, place: SlabSlice, own: Sequence[KeyValue]) -> None:
        """Copy a chunk's keys and values, one pair per layer, to their rows."""
        if place.slab not in self._slabs:
            num_rows = self._slab_rows[place.slab]
            self._slabs[place.slab] = [
                (Slab(num_rows, key, on_host=self.on_host), Slab(num_rows, value, on_host=self.on_host))
                for key, value in own
            ]
        for slabs, pair in zip(self._slabs[place.slab], own, strict=True):
            for slab, tensor in zip(slabs, pair, strict=True):
                slab.data[place.start : place.stop].copy_(tensor.detach(), non_blocking=True)

    def leaves(self, place: SlabSlice) -> list[KeyValue]:
        """Per layer, views of rows whose gradients are collected here."""
        needs_grad = torch.is_grad_enabled() and (self._prompts_get_grad or not place.slab.is_prompt)
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

    def drop(self, owner: int) -> None:
        """Free the slabs of an owner."""
        for key in [key for key in self._slabs if key.owner == owner]:
            del self._slabs[key]


class ChunkKeyValues:
    """What one chunk reads and leaves, for `RunningPass`.

    Attributes:
        own: After the pass, the keys and values of the chunk, one pair per layer.
        host: What brings keys and values from host memory, if they are there.
    """

    def __init__(self, store: SlabStore, chunk: ChunkPlan, device: torch.device) -> None:
        self.own: list[KeyValue] = []
        self.host: HostPrefixes | None = None
        self._store = store
        reads = [store.leaves(place) for place in chunk.reads]
        self._prefixes: list[tuple[KeyValue, ...]] = list(zip(*reads, strict=True))
        if store.on_host and reads:
            self.host = HostPrefixes(self._prefixes, device)

    def slots(self, num_layers: int) -> list[LayerSlot]:
        """The slots of the chunk's layers, chained."""
        if self.host is not None:
            return self.host.slots()
        return chain_slots(self._prefixes or [()] * num_layers)

    def same_layers(self, slots: Sequence[LayerSlot]) -> bool:
        """Whether the layers of the first chunk took these slots, in the same order."""
        modules = [slot.module for slot in slots]
        self._store.modules = self._store.modules or modules
        return modules == self._store.modules

    def saving(self) -> AbstractContextManager[Any]:
        """While layers run: keeps autograd from holding what can be brought from host memory again."""
        return nullcontext() if self.host is None else saved_tensors_hooks(self.host.pack, self.host.unpack)

    def record(self, slots: Sequence[LayerSlot]) -> None:
        """Take the keys and values out of the slots, which recomputation may keep alive."""
        for slot in slots:
            assert slot.own is not None
            self.own.append(slot.own)
            slot.own = None
