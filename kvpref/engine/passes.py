"""Run the passes of a mode and score the responses: the engine's public functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, overload

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.engine.level_pass import run_level_pass
from kvpref.engine.options import EngineOptions
from kvpref.engine.reads import batch_for
from kvpref.errors import InputError
from kvpref.models.attach import run_inside
from kvpref.models.both_ways import padded_spans
from kvpref.models.checkpointing import checkpointed, checkpoints_pass
from kvpref.models.experts import RouterTally
from kvpref.models.head import head_outputs
from kvpref.models.support import check_training_state
from kvpref.models.text_layers import PassExtras, run_backbone
from kvpref.models.vision.merging import PassImages
from kvpref.models.vision.tower import image_features
from kvpref.plan.batch import Batch
from kvpref.plan.chunks import MicroBatchChunks
from kvpref.plan.occurrences import pass_counts
from kvpref.plan.passes import ModePlan, PassPlan
from kvpref.records.outputs import ResponseLogps, ResponseRewards, Responses
from kvpref.records.requests import HeadOptions
from kvpref.state.cache import PrefixCache
from kvpref.tracing import region

_BALANCE_LOSS = "router_aux_loss"


def response_logps(
    model: nn.Module,
    batch: Batch,
    *,
    mode: str = "two_pass",
    backend: str = "auto",
    checkpoint: str = "none",
    head: HeadOptions | None = None,
) -> ResponseLogps:
    """Log-probs of the scored tokens of every sequence.

    Every mode returns the same numbers, to rounding, and the same gradients.

    Args:
        model: Attached with `kvpref.attach`; may be wrapped in PEFT, DDP or FSDP2.
        batch: From `kvpref.collate`, on the model's device.
        mode: ``two_pass``, ``one_pass``, ``packed`` or ``padded``.
        backend: Attention backend, or ``auto``; mode ``padded``, which runs transformers' `sdpa`, takes ``auto`` only.
        checkpoint: Which passes compute their activations again in the backward pass: ``none``, ``prefix`` (those whose
            keys and values others read) or ``all``. In training mode only.
        head: What is computed besides log-probs; nothing if None.

    Returns:
        The log-probs, in the caller's order of sequences.

    Raises:
        InputError: If a mode, backend or checkpoint is unknown or does not fit the others, a backend cannot serve here,
            or the model is a reward model.
        UnsupportedModelError: If the model's state (dropout, checkpointing) or this batch cannot be run exactly.
    """
    options = EngineOptions(mode=mode, backend=backend, checkpoint=checkpoint)
    return run_mode(model, batch, options, "tokens", head=head)


def response_rewards(
    model: nn.Module, batch: Batch, *, mode: str = "two_pass", backend: str = "auto", checkpoint: str = "none"
) -> ResponseRewards:
    """Rewards of every sequence under a model with a scalar head, read at its last token.

    Args:
        model: An `AutoModelForSequenceClassification` with ``num_labels=1``, attached with `kvpref.attach`. As in
            transformers, tokens at a sequence's end that equal ``config.pad_token_id`` are passed over.
        batch: From `kvpref.collate`, on the model's device.
        mode: As in `response_logps`.
        backend: As in `response_logps`.
        checkpoint: As in `response_logps`.

    Returns:
        The rewards, in the caller's order of sequences.

    Raises:
        InputError: If the model has no scalar head.
        As `response_logps` otherwise.
    """
    options = EngineOptions(mode=mode, backend=backend, checkpoint=checkpoint)
    return run_mode(model, batch, options, "ends")


@overload
def run_mode(
    model: nn.Module,
    batch: Batch,
    options: EngineOptions,
    reads: Literal["tokens"],
    *,
    head: HeadOptions | None = None,
) -> ResponseLogps: ...


@overload
def run_mode(
    model: nn.Module,
    batch: Batch,
    options: EngineOptions,
    reads: Literal["ends"],
    *,
    head: HeadOptions | None = None,
) -> ResponseRewards: ...


@overload
def run_mode(
    model: nn.Module, batch: Batch, options: EngineOptions, reads: str, *, head: HeadOptions | None = None
) -> Responses: ...


def run_mode(
    model: nn.Module, batch: Batch, options: EngineOptions, reads: str, *, head: HeadOptions | None = None
) -> Responses:
    """Run all passes of the options' mode at once.

    Args:
        model: Attached.
        batch: From `kvpref.collate`.
        options: Mode, backend and checkpoint; the schedule is not looked at.
        reads: ``tokens`` for a `ResponseLogps`, ``ends`` for a `ResponseRewards`.
        head: What is computed besides log-probs; nothing if None.

    Raises:
        As `response_logps`.
    """
    return run_with_routers(model, batch, replace(options, router_aux_loss_coef=None), reads, head=head)[0]


def run_with_routers(
    model: nn.Module, batch: Batch, options: EngineOptions, reads: str, *, head: HeadOptions | None = None
) -> tuple[Responses, torch.Tensor | None]:
    """As `run_mode`, and the load-balancing loss of a mixture of experts where the options ask for it, a scalar."""
    batch = batch_for(model, batch, reads)
    plan = batch.plan(options.mode)
    program = partial(
        _run_plan,
        plan=plan,
        batch=batch,
        backend=options.backend,
        checkpoint=options.checkpoint,
        head=head or HeadOptions(),
        counts=None if options.router_aux_loss_coef is None else pass_counts(batch, options.mode),
    )
    unique = run_inside(model, program)
    balance_loss = unique.pop(_BALANCE_LOSS, None)
    return responses(unique, plan, batch), balance_loss


def encode_prefix(model: nn.Module, batch: Batch, *, backend: str = "auto") -> PrefixCache:
    """Pass 1: encode the segments at depth 0, each shared prompt once.

    Returns:
        The prefix cache, in the autograd graph unless gradients are off.

    Raises:
        As `response_logps`.
    """
    EngineOptions(backend=backend)
    batch = batch_for(model, batch, "tokens")
    plan = batch.plan("two_pass")
    cache = PrefixCache()
    run_inside(model, partial(_run_passes, plan=plan, batch=batch, cache=cache, backend=backend, stop=1))
    return cache


def score_responses(
    model: nn.Module, batch: Batch, cache: PrefixCache, *, backend: str = "auto", head: HeadOptions | None = None
) -> ResponseLogps:
    """Pass 2 and, for deeper trees, the ones that follow: responses attend to the cache without copying it.

    Args:
        cache: From `encode_prefix` on the same batch; it is not changed and may be used again.

    Raises:
        InputError: If the cache was made from another batch or by another model.
        As `response_logps` otherwise.
    """
    EngineOptions(backend=backend)
    batch = batch_for(model, batch, "tokens")
    plan = batch.plan("two_pass")
    if not cache.begins(plan):
        raise InputError("the prefix cache was made from another batch; use what encode_prefix returned for this one")
    program = partial(
        _run_plan, plan=plan, batch=batch, backend=backend, cache=cache.fork(), head=head or HeadOptions()
    )
    found = responses(run_inside(model, program), plan, batch)
    assert isinstance(found, ResponseLogps)
    return found


def responses(unique: dict[str, torch.Tensor], plan: ModePlan | MicroBatchChunks, batch: Batch) -> Responses:
    """Give each sequence what the head made along its path: a `ResponseRewards` or a `ResponseLogps`."""
    found = {name: values.index_select(0, plan.token_index) for name, values in unique.items()}
    if batch.reads.kind == "ends":
        return ResponseRewards(group_index=batch.group_index, **found)
    return ResponseLogps(cu_seqlens=plan.cu_seqlens, group_index=batch.group_index, **found)


def _run_plan(
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
    """All passes not yet in `cache`, then the head; what it makes of the U unique rows that are read.

    With `counts`, how often the rows of each pass occur in the sequences, also the load-balancing loss.
    """
    cache = PrefixCache() if cache is None else cache
    routers = None if counts is None else RouterTally(model, counts)
    _run_passes(
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
        found = head_outputs(model, torch.cat(cache.predictor_hidden), plan.targets, head)
    if routers is not None:
        found[_BALANCE_LOSS] = routers.sums().balance_losses().squeeze(0)
    return found


def _run_passes(
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
    passes = plan.passes[cache.num_passes : stop]
    embeds = _embed(model, passes)
    extras = PassExtras(routers, _images(model, plan, batch, cache, checkpoint))
    for item, embedded in zip(passes, embeds, strict=True):
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
                    item,
                    embedded,
                    cache,
                    num_positions=plan.max_sequence_tokens,
                    backend=backend,
                    keep=is_prefix,
                    extras=extras,
                )
        cache.close_pass(item, hidden.flatten(0, 1).index_select(0, item.predictor_rows))


def _images(
    model: PreTrainedModel, plan: ModePlan, batch: Batch, cache: PrefixCache, checkpoint: str
) -> PassImages | None:
    """The images of all passes; their tower runs unless it has for passes that are held."""
    if not plan.images:
        return None
    inputs = batch.image_inputs()
    if cache.image_features is None:
        with region("vision tower"), checkpointed(model, checkpoints_pass(checkpoint, is_prefix=True)):
            cache.image_features = image_features(model, plan.images, inputs)
    return PassImages(model, cache.image_features, batch.sequences, inputs)


def _embed(model: PreTrainedModel, passes: tuple[PassPlan, ...]) -> tuple[torch.Tensor, ...]:
    """Input embeddings of each pass, (B, T_d, hidden_size); more than one pass has one row.

    Looked up together: the gradient of an embedding is as large as the vocabulary, whatever the number of tokens, and
    one lookup has one.
    """
    if not passes:
        return ()
    input_ids = torch.cat([item.input_ids for item in passes], dim=1)
    embeds: torch.Tensor = model.get_input_embeddings()(input_ids)
    if len(passes) == 1:
        return (embeds,)
    # Copies, because torch.compile would compile the first layer once more for a view.
    return tuple(part.clone() for part in embeds.split([item.input_ids.shape[1] for item in passes], dim=1))
