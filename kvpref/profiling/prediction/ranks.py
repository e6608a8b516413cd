"""Formulas for what one rank holds and what ranks exchange in a step, by how they share a model.

With n ranks, a collective over S bytes moves S (n - 1) / n to each rank if it is an all-gather or reduce-scatter, and
twice that if it is an all-reduce (rings; Patarasuk and Yuan 2009). A *unit* is gathered as a whole: a decoder layer, or
everything outside the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvpref.engine.options import EngineOptions
from kvpref.errors import InputError
from kvpref.profiling.memory.tracker import GRADIENTS, OPTIMIZER, PARAMETERS

GATHERED = "gathered by sharding"
MASTER = "float32 weights of DeepSpeed"
BUCKETS = "buckets of DDP"

DIVIDED: Mapping[str, tuple[str, ...]] = {
    "ddp": (),
    "zero1": (OPTIMIZER,),
    "zero2": (OPTIMIZER,),
    "zero3": (OPTIMIZER,),
    "fsdp2": (PARAMETERS, GRADIENTS, OPTIMIZER),
}
"""What each rank holds only a part of during a step, by the way to share a model. DeepSpeed's engine reduces gradients
once, at the end of the step, and ZeRO-3 gathers all weights for a step."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Devices that train one model.

    Raises:
        InputError: If a number is not positive, a way to share is unknown, or the numbers do not fit together.
    """

    world_size: int = 1
    """Number of ranks."""

    shard: str = "fsdp2"
    """One of `DIVIDED`."""

    sequence_parallel: int = 1
    """Number of ranks that share each micro-batch."""

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise InputError(f"the number of devices must be at least 1; got {self.world_size}")
        if self.shard not in DIVIDED:
            raise InputError(f"unknown way to shard {self.shard!r}; choose from: {', '.join(DIVIDED)}")
        if self.sequence_parallel < 1 or self.world_size % self.sequence_parallel:
            raise InputError(
                f"{self.sequence_parallel} devices cannot share each micro-batch: it must be a divisor of the "
                f"{self.world_size} devices (--world-size)"
            )

    @property
    def moved(self) -> float:
        """The share of distributed data that other ranks hold."""
        return (self.world_size - 1) / self.world_size


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """A model's sizes in bytes, in the dtype that passes compute in."""

    num_layers: int

    largest_layer: int

    largest_layer_grads: int
    """Gradients of the largest layer's trained weights."""

    outside: int
    """Weights outside the layers."""

    outside_grads: int
    """Gradients of the trained weights outside the layers."""

    weights: int

    grads: int
    """Gradients of all trained weights."""

    master: int
    """Trained weights in float32."""


def resident_bytes(held: Mapping[str, int], ranks: Ranks, variant: EngineOptions, model: ModelBytes) -> dict[str, int]:
    """Bytes that a rank holds in a step besides activations.

    Args:
        held: Weights, gradients and optimizer state on a single device, by category.
        ranks: How ranks share them.
        variant: How passes run.
        model: The model's sizes.
    """
    if ranks.world_size == 1:
        return dict(held)
    divided = {
        name: -(-num_bytes // ranks.world_size) if name in DIVIDED[ranks.shard] else num_bytes
        for name, num_bytes in held.items()
    }
    if ranks.shard == "ddp":
        return {**divided, BUCKETS: model.grads}
    if ranks.shard == "fsdp2":
        return {**divided, GATHERED: _gathered(variant, model)}
    # The engine trains its own float32 weights, with their optimizer state; the model has the dtype of passes.
    widening = model.master / max(1, held.get(GRADIENTS, 0))
    return {
        PARAMETERS: model.weights,
        GRADIENTS: model.grads,
        OPTIMIZER: round(divided.get(OPTIMIZER, 0) * widening),
        MASTER: -(-model.master // ranks.world_size),
    }


def _gathered(variant: EngineOptions, model: ModelBytes) -> int:
    """What FSDP2 gathers, and gradients that are not yet reduced to parts."""
    keeps_weights, keeps_grads = _keeps(variant)
    # One layer computes while the next one arrives.
    weights = model.weights if keeps_weights else 2 * model.largest_layer + model.outside
    grads = model.grads if keeps_grads else model.largest_layer_grads + model.outside_grads
    return weights + grads


def _keeps(variant: EngineOptions) -> tuple[bool, bool]:
    """Whether FSDP2 holds whole weights, and whole gradients, at some moment."""
    if variant.schedule == "bounded":
        return variant.gather_weights == "step", variant.reduce_grads == "step"
    # If a micro-batch runs in one pass, each layer is gathered and freed in FSDP2's usual way.
    several = variant.mode == "two_pass"
    return several, several


@dataclass(frozen=True, kw_only=True)
class StepPasses:
    """The passes that a rank runs in a step."""

    micro_batches: int

    forward: int
    """Forward passes, the first of each chunk."""

    backward: int

    kept: int
    """Backward passes whose graphs are kept; the others run forward once more."""

    tokens: int
    """Tokens of the forward passes."""


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Bytes that one rank receives in a step, and the number of collectives."""

    gathered_bytes: int = 0

    num_gathers: int = 0
    """Gathers of one unit each."""

    reduced_bytes: int = 0

    num_reductions: int = 0
    """Reductions of one unit each."""

    exchanged_bytes: int = 0
    """Bytes exchanged between ranks that share a micro-batch."""

    num_exchanges: int = 0
    """Number of all-to-alls."""

    @property
    def total_bytes(self) -> int:
        return self.gathered_bytes + self.reduced_bytes + self.exchanged_bytes


def communication(
    ranks: Ranks, variant: EngineOptions, model: ModelBytes, passes: StepPasses, heads_bytes: int
) -> Communication:
    """The communication of one rank in a step.

    Args:
        ranks: How ranks share the model.
        variant: How passes run.
        model: The model's sizes.
        passes: The passes of the step.
        heads_bytes: Bytes of one token's query, key, value and attention output, over all layers.
    """
    if ranks.world_size == 1:
        return Communication()
    gathers, reductions = _COUNTS[ranks.shard](variant, model, passes)
    all_reduce = 2 if ranks.shard == "ddp" else 1
    n = ranks.sequence_parallel
    # Forward, forward again if graphs are gone, and backward.
    runs = (passes.forward, passes.backward - passes.kept, passes.backward)
    exchanged = sum(runs) / max(1, passes.forward) * passes.tokens * heads_bytes * (n - 1) / n**2
    layer, layer_grads = (
        (whole - outside) / model.num_layers
        for whole, outside in ((model.weights, model.outside), (model.grads, model.outside_grads))
    )
    return Communication(
        gathered_bytes=round(ranks.moved * _bytes(gathers, layer, model.outside)),
        num_gathers=sum(gathers),
        reduced_bytes=round(all_reduce * ranks.moved * _bytes(reductions, layer_grads, model.outside_grads)),
        num_reductions=sum(reductions),
        exchanged_bytes=round(exchanged),
        num_exchanges=2 * model.num_layers * sum(runs) if n > 1 else 0,
    )


Counts = tuple[int, int]
"""Numbers of collectives for layers and for what is outside the layers."""


def _bytes(counts: Counts, layer: float, outside: int) -> float:
    return counts[0] * layer + counts[1] * outside


def _ddp(variant: EngineOptions, model: ModelBytes, passes: StepPasses) -> tuple[Counts, Counts]:
    return (0, 0), (model.num_layers, 1)


def _zero(variant: EngineOptions, model: ModelBytes, passes: StepPasses) -> tuple[Counts, Counts]:
    """Weights are gathered once: after the optimizer's step in ZeRO 1 and 2, before the passes in ZeRO 3."""
    return (model.num_layers, 1), (model.num_layers, 1)


def _fsdp2(variant: EngineOptions, model: ModelBytes, passes: StepPasses) -> tuple[Counts, Counts]:
    keeps_weights, keeps_grads = _keeps(variant)
    layers = model.num_layers
    if variant.schedule != "bounded":
        times = passes.micro_batches
        # The root stays from forward to backward.
        gathers = (layers if keeps_weights else 2 * layers) * times, times
        return gathers, (layers * times, times)
    with_graph = passes.backward
    without = passes.forward - passes.kept
    # The root stays after a forward pass, and goes with a backward pass; whole gradients are reduced in one of its own.
    chunkwise = layers * (without + 2 * with_graph), with_graph + int(keeps_grads)
    gathers = (layers, 1) if keeps_weights else chunkwise
    reductions = (layers * with_graph, with_graph) if not keeps_grads else (layers, 1)
    return gathers, reductions


_COUNTS: dict[str, Callable[[EngineOptions, ModelBytes, StepPasses], tuple[Counts, Counts]]] = {
    "ddp": _ddp,
    "zero1": _zero,
    "zero2": _zero,
    "zero3": _zero,
    "fsdp2": _fsdp2,
}
