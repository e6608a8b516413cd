"""What runs inside the model's forward for one chunk of the bounded schedule: its layers, and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from kvpref.engine.level_pass import run_level_pass
from kvpref.engine.options import EngineOptions
from kvpref.engine.predictors import read_rows
from kvpref.models.checkpointing import checkpointed, checkpoints_pass
from kvpref.models.experts import RouterSums, RouterTally
from kvpref.models.head import head_outputs
from kvpref.models.precision import without_cast_cache
from kvpref.models.text_layers import PassExtras
from kvpref.models.vision.merging import PassImages
from kvpref.models.vocabulary_grads import embed
from kvpref.parallel.sequence import sequence_ranks
from kvpref.plan.chunks import ChunkPlan
from kvpref.plan.occurrences import row_counts
from kvpref.records.requests import HeadOptions
from kvpref.state.slabs import ChunkKeyValues
from kvpref.tracing import region


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """Settings shared by all chunks of a step."""

    num_positions: int
    """Length of the longest sequence, in tokens."""

    options: EngineOptions
    """Backend, checkpointing and the load-balancing loss."""

    head: HeadOptions
    """What the head computes."""

    adds_in_place: bool
    """Whether the gradients of the vocabulary's weights are added to `.grad` directly, bypassing autograd."""

    needs_output: bool
    """Whether the last layer's output and the head must get a gradient, even if zero: other ranks may wait for it."""

    images: PassImages | None = None
    """The images that chunks read."""


class ChunkOutput(NamedTuple):
    """The results of one chunk."""

    rows: dict[str, torch.Tensor]
    """The head's outputs for its P predictor rows, by name; empty if there are none."""

    anchor: torch.Tensor | None
    """A scalar that depends on the last layer's output and the head, if no row does and `ChunkSettings.needs_output` is
    set."""

    routers: RouterSums | None
    """The sums of its expert layers' routers, if the options ask for the load-balancing loss."""


def run_chunk(
    model: PreTrainedModel, *, chunk: ChunkPlan, key_values: ChunkKeyValues, settings: ChunkSettings
) -> ChunkOutput:
    """One chunk through the layers and the head.

    Args:
        model: An attached model; this runs inside its forward.
        chunk: The chunk to run.
        key_values: What it reads, and where its own keys and values go.
        settings: The settings of the step.
    """
    options, item, inverse = settings.options, chunk.item, chunk.inverse
    routers = None
    if options.router_aux_loss_coef is not None:
        routers = RouterTally(model, [row_counts(chunk.occurrences, chunk.targets.device)])
    ranks = sequence_ranks(model)
    if ranks is not None:
        share = ranks.share(chunk.item)
        item, inverse = share.item, share.rows(chunk.inverse)
    checkpoints = torch.is_grad_enabled() and checkpoints_pass(options.checkpoint, is_prefix=chunk.writes is not None)
    with without_cast_cache(chunk.targets.device), key_values.saving(), checkpointed(model, checkpoints):
        embedding = model.get_input_embeddings()
        if settings.adds_in_place:
            embeds = embed(embedding, item.input_ids, chunk.unique_ids, inverse)
        else:
            embeds = embedding(item.input_ids)
        hidden = run_level_pass(
            model,
            item,
            embeds,
            key_values,
            num_positions=settings.num_positions,
            backend=options.backend,
            keep=chunk.writes is not None,
            extras=PassExtras(routers, settings.images, ranks),
        )
        sums = None if routers is None else routers.sums()
        rows = hidden.flatten(0, 1).index_select(0, item.predictor_rows)
        if not rows.shape[0]:
            return ChunkOutput({}, _anchor(model, hidden, settings.head) if settings.needs_output else None, sums)
        with region("lm head"):
            in_place = settings.adds_in_place
            found = read_rows(model, (chunk.item,), rows, chunk.targets, settings.head, in_place=in_place)
        return ChunkOutput(found, None, sums)


def _anchor(model: PreTrainedModel, hidden: torch.Tensor, head: HeadOptions) -> torch.Tensor:
    row = hidden.flatten(0, 1)[:1]
    made = head_outputs(model, row, torch.zeros(row.shape[0], dtype=torch.int64, device=row.device), head)
    return torch.stack([values.sum().to(row.dtype) for values in (hidden, *made.values())]).sum()
