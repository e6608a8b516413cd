"""`Step`: the micro-batches of one optimizer step, joined so that shared tokens are encoded once."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace

import torch

from kvpref.plan.batch import Batch, ImageInputs
from kvpref.plan.chunks import StepChunks, build_step_chunks
from kvpref.records.tensor_fields import map_tensors, tensors_to


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What the bounded schedule runs between two updates of the weights.

    Attributes:
        batches: The micro-batches.
        chunks: Their forward passes, on the batches' device.
        prefix_grad: Whether prompts get a gradient.
    """

    batches: tuple[Batch, ...]
    chunks: StepChunks
    prefix_grad: bool = True

    def image_inputs(self) -> Mapping[str, ImageInputs]:
        """The tower's inputs by image key. They stay in host memory and are read when first asked for."""
        known: dict[str, ImageInputs] = {}
        for batch in self.batches:
            known.update(batch.image_inputs(known))
        return known

    def to(self, device: torch.device | str) -> Step:
        """This step with all tensors on `device`."""
        batches = tuple(batch.to(device) for batch in self.batches)
        return replace(self, batches=batches, chunks=tensors_to(self.chunks, device))

    def pin_memory(self, images: dict[str, ImageInputs] | None = None) -> Step:
        """This step with all tensors in page-locked memory, each image once; `images` as in `Batch.pin_memory`."""
        images = {} if images is None else images
        batches = tuple(batch.pin_memory(images) for batch in self.batches)
        return replace(self, batches=batches, chunks=map_tensors(self.chunks, torch.Tensor.pin_memory))


def join_batches(
    batches: AbstractSequence[Batch],
    *,
    max_tokens_per_chunk: int | None,
    prefix_grad: bool = True,
    counts_occurrences: bool = True,
) -> Step:
    """Join the micro-batches of one optimizer step.

    Args:
        batches: At least one, from `kvpref.collate` with the same sharing settings, on one device.
        max_tokens_per_chunk: Most tokens of a forward pass; None for no bound.
        prefix_grad: Whether prompts get a gradient.
        counts_occurrences: Whether to count how many sequences hold each token, which router_aux_loss_coef needs.

    Raises:
        ValueError: If there are no batches, they differ in sharing or device, or the bound is below 1.
    """
    if not batches:
        raise ValueError("an optimizer step needs at least one micro-batch; got none")
    if max_tokens_per_chunk is not None and max_tokens_per_chunk < 1:
        raise ValueError(f"max_tokens_per_chunk must be at least 1; got {max_tokens_per_chunk}")
    first = batches[0]
    shared = (first.sharing, first.device, first.reads)
    if any((batch.sharing, batch.device, batch.reads) != shared for batch in batches):
        raise ValueError("the micro-batches of a step must be collated with the same limits, and on one device")
    sequences = [batch.parts for batch in batches]
    tree = first.tree
    if len(batches) > 1:
        tree = first.sharing.tree([part for batch in batches for part in batch.parts])
    chunks = build_step_chunks(
        sequences,
        tree,
        max_tokens=max_tokens_per_chunk,
        prefix_grad=prefix_grad,
        reads=first.reads,
        counts_occurrences=counts_occurrences,
    )
    if first.device.type != "cpu":
        chunks = tensors_to(chunks, first.device)
    return Step(batches=tuple(batches), chunks=chunks, prefix_grad=prefix_grad)
