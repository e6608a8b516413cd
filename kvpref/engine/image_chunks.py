"""The vision tower in the bounded schedule: some images at a time, forward first and backward last.

Their features are kept in one table without a graph, which all chunks of text read and leave gradients in. At the end
of the step the tower runs again, with a graph, and receives these gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.autograd.graph import GradientEdge
from transformers import PreTrainedModel

from kvpref.engine.options import EngineOptions
from kvpref.models.checkpointing import checkpointed, checkpoints_pass
from kvpref.models.precision import without_cast_cache
from kvpref.models.support import unwrap
from kvpref.models.vision.merging import PassImages
from kvpref.models.vision.support import check_images
from kvpref.models.vision.tower import image_features
from kvpref.parallel.plain import Wrapper
from kvpref.plan.batch import ImageInputs
from kvpref.plan.step import Step
from kvpref.records.images import Image
from kvpref.state.image_features import FeatureTable, ImageFeatures
from kvpref.state.slab import edge_of
from kvpref.tracing import region


class _Part(NamedTuple):
    """Images [first, stop) that run together, and their rows of the table."""

    first: int
    stop: int
    first_row: int
    stop_row: int


class StepImages:
    """The images of an optimizer step.

    Args:
        wrapper: An attached model, possibly wrapped.
        step: The step to run.
        options: The bound and checkpointing.

    Raises:
        UnsupportedModelError: If the model is not known to be exact with images.
    """

    def __init__(self, wrapper: Wrapper, step: Step, options: EngineOptions) -> None:
        self._wrapper, self._options = wrapper, options
        self._images = step.chunks.images
        self._parts = _parts(self._images, options.chunk_tokens)
        self._edges: dict[_Part, tuple[GradientEdge | None, ...]] = {}
        self._passes: PassImages | None = None
        self._text_tokens = step.chunks.max_chunk_tokens
        if not self._images:
            return
        inner = unwrap(wrapper.model)
        check_images(inner, self._images)
        self._gets_grad = any(
            chunk.item.image_rows.numel() > 0 and (options.prefix_grad or not chunk.is_prompt)
            for chunk in step.chunks.all
        )
        self._table = FeatureTable(self._parts[-1].stop_row)
        self._inputs: dict[str, ImageInputs] = {}
        for batch in step.batches:
            self._inputs.update(batch.image_inputs(self._inputs))
        sequences = tuple(sequence for batch in step.batches for sequence in batch.parts)
        self._passes = PassImages(inner, self._table, sequences, self._inputs, self._images)

    @property
    def passes(self) -> PassImages | None:
        """What chunks read of the images; None if there are none."""
        return self._passes

    @property
    def chunk_tokens(self) -> int | None:
        """How many tokens of text may keep their graphs besides those that images keep."""
        if self._options.chunk_tokens is None:
            return None
        return self._options.chunk_tokens - sum(part.stop_row - part.first_row for part in self._edges)

    def forward(self, *, keep_graph: bool) -> None:
        """Fill the table.

        Args:
            keep_graph: Whether `backward` follows, so that the last images use what is left of the bound.
        """
        for part in self._parts:
            # The last part always keeps its graph if gradients are wanted: it tells whether any tower weight trains.
            with_graph = keep_graph and self._gets_grad and part is self._parts[-1]
            with torch.set_grad_enabled(with_graph), region("vision tower"):
                made = self._run(part)
            self._table.write(part.first_row, made)
            if with_graph:
                edges = _edges(made)
                self._table.requires_grad = any(edge is not None for edge in edges)
                if self._table.requires_grad and self._has_room(part):
                    self._edges[part] = edges

    def backward(self) -> None:
        """Propagate the gradients that chunks left to the tower and projector."""
        if not self._images or not self._table.has_grads:
            return
        for part in reversed(self._parts):
            edges = self._edges.pop(part, None)
            if edges is None:
                with torch.enable_grad(), region("recompute vision tower"):
                    edges = _edges(self._run(part))
            roots = list(self._table.roots(part.first_row, part.stop_row, edges))
            if roots:
                with region("backward vision tower"):
                    torch.autograd.backward([edge for edge, _ in roots], [grad for _, grad in roots])

    def _has_room(self, part: _Part) -> bool:
        limit = self._options.chunk_tokens
        return limit is None or part.stop_row - part.first_row + self._text_tokens <= limit

    def _run(self, part: _Part) -> ImageFeatures:
        program = partial(
            _run_part,
            images=self._images[part.first : part.stop],
            inputs=self._inputs,
            checkpoints=torch.is_grad_enabled() and checkpoints_pass(self._options.checkpoint, is_prefix=True),
        )
        return self._wrapper.run_chunk(program)


def _run_part(
    model: PreTrainedModel, *, images: Sequence[Image], inputs: dict[str, ImageInputs], checkpoints: bool
) -> ImageFeatures:
    with without_cast_cache(model.device), checkpointed(model, checkpoints):
        return image_features(model, images, inputs)


def _edges(made: ImageFeatures) -> tuple[GradientEdge | None, ...]:
    return tuple(edge_of(tensor) for tensor in (made.features, *made.deepstack))


def _parts(images: Sequence[Image], limit: int | None) -> list[_Part]:
    """The images in parts within the bound of tokens, at least one image each."""
    rows = list(accumulate((image.num_tokens for image in images), initial=0))
    found: list[_Part] = []
    first = 0
    for index in range(1, len(images) + 1):
        is_full = limit is not None and index < len(images) and rows[index + 1] - rows[first] > limit
        if is_full or index == len(images):
            found.append(_Part(first, index, rows[first], rows[index]))
            first = index
    return found
