"""The states that recurrent and convolution layers leave for the passes that follow: one per segment, not per token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from kvpref.plan.chunks import ChunkPlan, SlabSlice
from kvpref.prefix.slab_reads import SlabKey
from kvpref.state.slab import Slab, edge_of
from kvpref.tracing import mark

States = tuple[torch.Tensor, ...]
"""The states of one mixer, (P, ...) each, in the order in which it uses them."""

Incoming = Callable[[], Iterable[tuple[GradientEdge, torch.Tensor]]]
"""Called for the backward pass of a chunk: where gradients enter its graph, and their values."""


class RecurrentStates(Protocol):
    """Where a running pass finds the states that its mixers start from, and leaves their own."""

    def before(self) -> Mapping[nn.Module, States]:
        """The states that the segments' parents left."""

    def record(self, left: Mapping[nn.Module, States]) -> None:
        """Store the states that a pass leaves."""


class HeldStates:
    """States in the autograd graph. Parents are always in the previous pass, so only its states are held."""

    def __init__(self) -> None:
        self._held: Mapping[nn.Module, States] = {}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for states in self._held.values() for tensor in states)

    def before(self) -> Mapping[nn.Module, States]:
        return self._held

    def record(self, left: Mapping[nn.Module, States]) -> None:
        self._held = left
        mark("prefix K/V", *(tensor for states in left.values() for tensor in states))


class RecurrentSlabs:
    """The states that chunks of one optimizer step leave for one another, and their gradients.

    Args:
        num_states: States of each slab.
        prompts_get_grad: Whether slabs of prompts collect gradients.
    """

    def __init__(self, num_states: Mapping[SlabKey, int], *, prompts_get_grad: bool) -> None:
        self._num_states, self._prompts_get_grad = num_states, prompts_get_grad
        self._slabs: dict[SlabKey, dict[nn.Module, list[Slab]]] = {}

    def leaves(self, places: Iterable[SlabSlice]) -> dict[nn.Module, States]:
        """Per mixer, its states at several places, concatenated; their gradients are collected here."""
        found: dict[nn.Module, list[list[torch.Tensor]]] = {}
        for place in places:
            needs_grad = torch.is_grad_enabled() and (self._prompts_get_grad or not place.slab.is_prompt)
            for module, slabs in self._slabs.get(place.slab, {}).items():
                leaves = [slab.leaf(place.start, place.stop, requires_grad=needs_grad) for slab in slabs]
                found.setdefault(module, []).append(leaves)
        return {
            module: tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*several, strict=True))
            for module, several in found.items()
        }

    def write(self, place: SlabSlice, left: Mapping[nn.Module, States]) -> None:
        """Copy the states that a chunk leaves to their places."""
        if place.slab not in self._slabs:
            num_states = self._num_states[place.slab]
            self._slabs[place.slab] = {
                module: [Slab(num_states, tensor) for tensor in states] for module, states in left.items()
            }
        for module, states in left.items():
            for slab, tensor in zip(self._slabs[place.slab][module], states, strict=True):
                slab.data[place.start : place.stop].copy_(tensor.detach())

    def incoming(
        self, place: SlabSlice, edges: Mapping[nn.Module, list[GradientEdge | None]]
    ) -> Iterator[tuple[GradientEdge, torch.Tensor]]:
        """The gradients collected for the states of a chunk."""
        for module, several in edges.items():
            for edge, slab in zip(several, self._slabs[place.slab][module], strict=True):
                if edge is not None and slab.grad is not None:
                    yield edge, slab.grad[place.start : place.stop]

    def drop(self, owner: int) -> None:
        """Free the states of an owner."""
        for key in [key for key in self._slabs if key.owner == owner]:
            del self._slabs[key]


class ChunkRecurrent:
    """The states that the mixers of one chunk start from and leave."""

    def __init__(self, slabs: RecurrentSlabs, chunk: ChunkPlan) -> None:
        self._slabs, self._reads, self._place = slabs, chunk.state_reads, chunk.state_writes
        self._left: Mapping[nn.Module, States] = {}

    def before(self) -> Mapping[nn.Module, States]:
        return self._slabs.leaves(self._reads)

    def record(self, left: Mapping[nn.Module, States]) -> None:
        self._left = left

    def write(self) -> None:
        """Copy what the chunk leaves to its places."""
        if self._place is not None:
            self._slabs.write(self._place, self._left)

    def incoming(self) -> Incoming:
        """A callable for the gradients that others will have left for the chunk's own states, which are forgotten."""
        left, self._left = self._left, {}
        if self._place is None:
            return tuple
        edges = {module: [edge_of(tensor) for tensor in states] for module, states in left.items()}
        return partial(self._slabs.incoming, self._place, edges)
