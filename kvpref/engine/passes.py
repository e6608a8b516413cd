"""Run the passes of a mode and score the responses: the engine's public functions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, overload

import torch
from torch import nn

from kvpref.engine.mode_program import BALANCE_LOSS, run_passes, run_plan
from kvpref.engine.options import EngineOptions
from kvpref.engine.reads import batch_for
from kvpref.errors import InputError
from kvpref.parallel.wrapping import wrapper_of
from kvpref.plan.batch import Batch
from kvpref.plan.chunks import MicroBatchChunks
from kvpref.plan.occurrences import pass_counts
from kvpref.plan.passes import ModePlan
from kvpref.records.outputs import ResponseLogps, ResponseRewards, Responses
from kvpref.records.requests import HeadOptions
from kvpref.state.cache import PrefixCache


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
        checkpoint: Which passes recompute their activations in the backward pass: ``none``, ``prefix`` (those whose
            keys and values others read) or ``all``. In training mode only.
        head: What to compute besides log-probs; nothing if None.

    Returns:
        The log-probs, in the caller's order of sequences.

    Raises:
        InputError: If a mode, backend or checkpoint is unknown or does not fit the others, the backend cannot serve
            here, or the model is a reward model.
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
            transformers, trailing tokens equal to ``config.pad_token_id`` are skipped.
        batch: From `kvpref.collate`, on the model's device.
        mode: As in `response_logps`.
        backend: As in `response_logps`.
        checkpoint: As in `response_logps`.

    Returns:
        The rewards, in the caller's order of sequences.

    Raises:
        InputError: If the model has no scalar head; otherwise as `response_logps`.
        UnsupportedModelError: As `response_logps`.
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
        model: An attached model.
        batch: From `kvpref.collate`.
        options: Mode, backend and checkpoint; the schedule is ignored.
        reads: ``tokens`` for a `ResponseLogps`, ``ends`` for a `ResponseRewards`.
        head: What to compute besides log-probs; nothing if None.

    Raises:
        As `response_logps`.
    """
    return run_with_routers(model, batch, replace(options, router_aux_loss_coef=None), reads, head=head)[0]


def run_with_routers(
    model: nn.Module, batch: Batch, options: EngineOptions, reads: str, *, head: HeadOptions | None = None
) -> tuple[Responses, torch.Tensor | None]:
    """Like `run_mode`, and the scalar load-balancing loss of a mixture of experts if the options ask for it."""
    batch = batch_for(model, batch, reads)
    plan = batch.plan(options.mode)
    program = partial(
        run_plan,
        plan=plan,
        batch=batch,
        backend=options.backend,
        checkpoint=options.checkpoint,
        head=head or HeadOptions(),
        counts=None if options.router_aux_loss_coef is None else pass_counts(batch, options.mode),
    )
    unique = wrapper_of(model).run_whole(program, several_passes=options.mode == "two_pass")
    balance_loss = unique.pop(BALANCE_LOSS, None)
    return responses(unique, plan, batch), balance_loss


def encode_prefix(model: nn.Module, batch: Batch, *, backend: str = "auto") -> PrefixCache:
    """Pass 1: encode the segments at depth 0, each shared prompt once.

    Args:
        model: As in `response_logps`.
        batch: As in `response_logps`.
        backend: As in `response_logps`.

    Returns:
        The prefix cache, in the autograd graph unless gradients are off.

    Raises:
        InputError: As `response_logps`.
        UnsupportedModelError: As `response_logps`.
    """
    EngineOptions(backend=backend)
    batch = batch_for(model, batch, "tokens")
    plan = batch.plan("two_pass")
    cache = PrefixCache()
    program = partial(run_passes, plan=plan, batch=batch, cache=cache, backend=backend, stop=1)
    wrapper_of(model).run_whole(program, several_passes=True)
    return cache


def score_responses(
    model: nn.Module, batch: Batch, cache: PrefixCache, *, backend: str = "auto", head: HeadOptions | None = None
) -> ResponseLogps:
    """Pass 2 and, for deeper trees, the ones that follow: responses attend to the cache without copying it.

    Args:
        model: As in `response_logps`.
        batch: As in `response_logps`.
        cache: From `encode_prefix` on the same batch; it is not changed and may be reused.
        backend: As in `response_logps`.
        head: As in `response_logps`.

    Raises:
        InputError: If the cache was made from another batch or by another model; otherwise as `response_logps`.
        UnsupportedModelError: As `response_logps`.
    """
    EngineOptions(backend=backend)
    batch = batch_for(model, batch, "tokens")
    plan = batch.plan("two_pass")
    if not cache.begins(plan):
        raise InputError("the prefix cache was made from another batch; use what encode_prefix returned for this one")
    program = partial(run_plan, plan=plan, batch=batch, backend=backend, cache=cache.fork(), head=head or HeadOptions())
    found = responses(wrapper_of(model).run_whole(program, several_passes=True), plan, batch)
    assert isinstance(found, ResponseLogps)
    return found


def responses(unique: dict[str, torch.Tensor], plan: ModePlan | MicroBatchChunks, batch: Batch) -> Responses:
    """Gather the head's outputs along each sequence's path into a `ResponseRewards` or a `ResponseLogps`."""
    found = {name: values.index_select(0, plan.token_index) for name, values in unique.items()}
    if batch.reads.kind == "ends":
        return ResponseRewards(group_index=batch.group_index, **found)
    # A response of several parts has the scored tokens of all parts; the plan's offsets are per part.
    weights = batch.token_weights(found["token_logps"].dtype)
    return ResponseLogps(cu_seqlens=batch.cu_seqlens, group_index=batch.group_index, weights=weights, **found)
