"""What runs inside the model's forward: the passes of a mode, and the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kvpref.engine.level_pass import run_level_pass
from kvpref.engine.predictors import read_rows
from kvpref.models.both_ways import padded_spans
from kvpref.models.checkpointing import checkpointed, checkpoints_pass, is_checkpointing
from kvpref.models.compilation import is_compiled
from kvpref.models.experts import RouterTally
from kvpref.models.support import check_training_state
from kvpref.models.text_layers import PassExtras, run_backbone
from kvpref.models.vision.merging import PassImages
from kvpref.models.vision.tower import image_features
from kvpref.parallel.sequence import check_options, sequence_ranks
from kvpref.plan.batch import Batch
from kvpref.plan.passes import ModePlan, PassPlan
from kvpref.records.requests import HeadOptions
from kvpref.state.cache import PrefixCache
from kvpref.tracing import region

BALANCE_LOSS = "router_aux_loss"
"""Its name among a program's outputs."""


def run_plan(
    model: PreTrainedModel,
    *,
    plan: ModePlan,
    batch: Batch,
    backend: str,
    head: HeadOptions,
    cache: PrefixCache | None = None,
    checkpoint: str = "none",
    counts: Sequence[torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Run all passes not yet in `cache`, then the head; returns its outputs for the U unique rows that are read.

    With `counts` (how often the rows of each pass occur in the sequences), also the load-balancing loss.
    """
    cache = PrefixCache() if cache is None else cache
    routers = None if counts is None else RouterTally(model, counts)
    run_passes(
        model,
        plan=plan,
        batch=batch,
        cache=cache,
        backend=backend,
        stop=len(plan.passes),
        checkpoint=checkpoint,
        routers=routers,
    )
    with region("lm head"):
        found = read_rows(model, plan.passes, torch.cat(cache.predictor_hidden), plan.targets, head)
    if routers is not None:
        found[BALANCE_LOSS] = routers.sums().balance_losses().squeeze(0)
    return found


def run_passes(
    model: PreTrainedModel,
    *,
    plan: ModePlan,
    batch: Batch,
    cache: PrefixCache,
    backend: str,
    stop: int,
    checkpoint: str = "none",
    routers: RouterTally | None = None,
) -> None:
    check_training_state(model)
    check_options(model, mode=plan.mode, has_images=bool(plan.images), balances_experts=routers is not None)
    ranks = sequence_ranks(model)
    passes = plan.passes[cache.num_passes : stop]
    shares = passes if ranks is None else tuple(ranks.share(item).item for item in passes)
    embeds = _embed(model, shares)
    extras = PassExtras(routers, _images(model, plan, batch, cache, checkpoint), ranks)
    for item, share, embedded in zip(passes, shares, embeds, strict=True):
        is_prefix = item is not plan.passes[-1]
        with (
            region(f"pass {cache.num_passes}"),
            checkpointed(model, checkpoints_pass(checkpoint, is_prefix=is_prefix)),
        ):
            if plan.mode == "padded":
                with padded_spans(model, item):
                    hidden = run_backbone(model, item, embedded, item.attention_mask, extras)
            else:
                cache.claim(model)
                hidden = run_level_pass(
                    model,
                    share,
                    embedded,
                    cache,
                    num_positions=plan.max_sequence_tokens,
                    backend=backend,
                    keep=is_prefix,
                    extras=extras,
                )
        cache.close_pass(item, hidden.flatten(0, 1).index_select(0, share.predictor_rows))


def _images(
    model: PreTrainedModel, plan: ModePlan, batch: Batch, cache: PrefixCache, checkpoint: str
) -> PassImages | None:
    """The images of all passes; their tower runs unless `cache` holds their features."""
    if not plan.images:
        return None
    inputs = batch.image_inputs()
    if cache.image_features is None:
        with region("vision tower"), checkpointed(model, checkpoints_pass(checkpoint, is_prefix=True)):
            cache.image_features = image_features(model, plan.images, inputs)
    keeps = checkpoint == "none" and not (is_checkpointing(model) or is_compiled(model))
    return PassImages(model, cache.image_features, batch.parts, inputs, plan.images, keeps=keeps)


def _embed(model: PreTrainedModel, passes: tuple[PassPlan, ...]) -> tuple[torch.Tensor, ...]:
    """Input embeddings of each pass, (B, T_d, hidden_size); more than one pass has one row.

    They are looked up together: each lookup has a gradient as large as the vocabulary, whatever its number of tokens.
    """
    if not passes:
        return ()
    input_ids = torch.cat([item.input_ids for item in passes], dim=1)
    embeds: torch.Tensor = model.get_input_embeddings()(input_ids)
    if len(passes) == 1:
        return (embeds,)
    # Copies, because torch.compile would recompile the first layer for a view.
    return tuple(part.clone() for part in embeds.split([item.input_ids.shape[1] for item in passes], dim=1))
