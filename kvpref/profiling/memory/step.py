"""A training step in each of the variants whose memory is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import forward_backward
from kvpref.errors import InputError
from kvpref.losses import LossFunction, PreferenceLoss
from kvpref.models.attention_shapes import attention_shapes
from kvpref.models.support import unwrap
from kvpref.plan.batch import Batch
from kvpref.plan.flops import AttentionShape
from kvpref.profiling.precision import compute_dtype
from kvpref.profiling.steps import StepMicroBatch, make_micro_batches
from kvpref.records.groups import Group
from kvpref.tracing import region

VARIANTS: Mapping[str, EngineOptions] = {
    "full": EngineOptions(mode="two_pass", schedule="full"),
    "bounded": EngineOptions(mode="two_pass", schedule="bounded"),
    "one_pass": EngineOptions(mode="one_pass"),
    "packed": EngineOptions(mode="packed"),
    "padded": EngineOptions(mode="padded"),
}
"""Name -> options of the step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryCase:
    """One step to measure."""

    variant: str
    """One of `VARIANTS`."""

    cut: Sequence[Sequence[Group]]
    """The groups of each of its micro-batches."""

    num_responses: int | None = None
    """Responses that each group was cut down to; None if groups are whole."""

    max_tokens_per_chunk: int | None = None
    """As in `kvpref.forward_backward`; used only by variant ``bounded``."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(f"unknown variant {self.variant!r}; choose from: {', '.join(VARIANTS)}")

    @property
    def name(self) -> str:
        """The variant, and the number of responses if groups were cut down."""
        return self.variant if self.num_responses is None else f"{self.variant} N={self.num_responses}"

    @property
    def options(self) -> EngineOptions:
        """The engine options it runs with."""
        options = VARIANTS[self.variant]
        if options.schedule != "bounded":
            return options
        return replace(options, max_tokens_per_chunk=self.max_tokens_per_chunk)


@dataclass(frozen=True, kw_only=True)
class KeyValueSize:
    """The size of one token's keys and values in attention layers of one kind."""

    num_layers: int

    num_kv_heads: int

    key_dim: int
    """Dimensions of a head's key."""

    value_dim: int
    """Dimensions of a head's value."""

    @property
    def num_elements(self) -> int:
        """Numbers per token."""
        return self.num_layers * self.num_kv_heads * (self.key_dim + self.value_dim)

    def __str__(self) -> str:
        heads = f"{self.num_layers} layers x {self.num_kv_heads} KV heads"
        if self.key_dim == self.value_dim:
            return f"2 x {heads} x {self.key_dim} dims"
        return f"{heads} x ({self.key_dim} + {self.value_dim}) dims"


@dataclass(frozen=True, kw_only=True)
class PrefixSize:
    """The size of the keys and values of shared prefixes by the formula: all layers x tokens x itemsize."""

    layers: tuple[KeyValueSize, ...]
    """The model's attention layers, grouped by size."""

    num_tokens: int
    """Unique tokens whose keys and values are kept for later passes, in the largest micro-batch."""

    itemsize: int
    """Bytes of a number."""

    @property
    def num_bytes(self) -> int:
        return sum(layers.num_elements for layers in self.layers) * self.num_tokens * self.itemsize

    def __str__(self) -> str:
        layers = " + ".join(map(str, self.layers))
        return f"{f'({layers})' if len(self.layers) > 1 else layers} x {self.num_tokens} tokens x {self.itemsize} bytes"


class ProfiledStep:
    """The step of a case: forward and backward of every micro-batch, and the optimizer's step.

    Args:
        model: Attached model, in training mode.
        loss: As for `kvpref.forward_backward`.
        optimizer: Steps at the end.
        case: The case to run.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PreferenceLoss | LossFunction,
        optimizer: torch.optim.Optimizer,
        case: MemoryCase,
    ) -> None:
        self.model, self.loss, self.optimizer, self.case = model, loss, optimizer, case
        self.device = next(model.parameters()).device
        self.options = case.options
        mode = self.options.mode
        self.micro_batches = make_micro_batches(model, case.cut, loss, mode=mode, device=self.device)

    def run(self) -> None:
        """Zero the gradients, run every micro-batch, step the optimizer."""
        self.model.zero_grad(set_to_none=True)
        for item in self.micro_batches:
            self._forward_backward(item)
        with region("optimizer"):
            self.optimizer.step()

    def facts(self) -> dict[str, int]:
        batches = [item.batch for item in self.micro_batches]
        return {
            "num_micro_batches": len(batches),
            "num_groups": sum(batch.num_groups for batch in batches),
            "num_sequences": sum(batch.num_sequences for batch in batches),
            "total_tokens": sum(batch.num_total_tokens for batch in batches),
            "unique_tokens": sum(batch.num_unique_tokens for batch in batches),
        }

    def prefix_size(self) -> PrefixSize:
        """The size of the prefix keys and values of the largest micro-batch."""
        return PrefixSize(
            layers=_key_value_sizes(attention_shapes(unwrap(self.model))),
            num_tokens=max(self._num_prefix_tokens(item.batch) for item in self.micro_batches),
            itemsize=compute_dtype(self.model).itemsize,
        )

    def _num_prefix_tokens(self, batch: Batch) -> int:
        if self.options.mode != "two_pass":
            return 0  # no pass reads another's keys and values
        if self.options.schedule == "full":
            return sum(item.input_ids.numel() for item in batch.plan("two_pass").passes[:-1])
        limit = self.options.chunk_tokens or batch.num_unique_tokens
        tree = batch.tree
        # Earlier pieces of a segment longer than a chunk are read by its later pieces.
        return int(tree.lengths[tree.has_children | (tree.lengths > limit)].sum())

    def _forward_backward(self, item: StepMicroBatch) -> None:
        forward_backward(
            self.model,
            item.batch,
            self.loss,
            self.options,
            reference=item.reference,
            backward=lambda value: (value * item.weight).backward(),  # type: ignore[no-untyped-call]
        )


def _key_value_sizes(kinds: Iterable[AttentionShape]) -> tuple[KeyValueSize, ...]:
    """Sizes of a token's keys and values, whatever the rules of the layers."""
    counts = Counter[tuple[int, int, int]]()
    for kind in kinds:
        counts[kind.num_kv_heads, kind.head_dim, kind.value_dim] += kind.num_layers
    return tuple(
        KeyValueSize(num_layers=num_layers, num_kv_heads=num_heads, key_dim=key_dim, value_dim=value_dim)
        for (num_heads, key_dim, value_dim), num_layers in counts.items()
    )
