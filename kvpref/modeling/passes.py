"""Run the passes of a mode and score the responses: the engine's public functions."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.batch import Batch
from kvpref.errors import InputError
from kvpref.modeling.attach import run_inside
from kvpref.modeling.cache import KeyValues, PrefixCache
from kvpref.modeling.checkpointing import checkpointed, checkpoints_pass
from kvpref.modeling.head import head_logps
from kvpref.modeling.interface import RunningPass, bind_pass
from kvpref.modeling.support import check_training_state
from kvpref.outputs import ResponseLogps
from kvpref.plans import ModePlan, PassPlan
from kvpref.regions import region


def response_logps(
    model: nn.Module, batch: Batch, *, mode: str = "two_pass", backend: str = "auto", checkpoint: str = "none"
) -> ResponseLogps:
    """Log-probs of the scored tokens of every sequence.

    Every mode returns the same numbers, to rounding, and the same gradients.

    Args:
        model: Attached with `kvpref.attach`; may be wrapped in PEFT, DDP or FSDP2.
        batch: From `kvpref.collate`, on the model's device.
        mode: ``two_pass``, ``one_pass``, ``packed`` or ``padded``.
        backend: Attention backend, or ``auto``; mode ``padded`` always runs transformers' `sdpa`.
        checkpoint: Which passes compute their activations again in the backward pass: ``none``, ``prefix`` (those whose
            keys and values others read) or ``all``. In training mode only.

    Returns:
        The log-probs, in the caller's order of sequences.

    Raises:
        ValueError: Unknown mode or backend, or a backend that cannot serve here.
        UnsupportedModelError: If the model's state (dropout, checkpointing) or this batch cannot be run exactly.
    """
    plan = batch.plan(mode)
    unique_logps = run_inside(model, partial(_run_plan, plan=plan, backend=backend, checkpoint=checkpoint))
    return _gather(unique_logps, plan, batch)


def encode_prefix(model: nn.Module, batch: Batch, *, backend: str = "auto") -> PrefixCache:
    """Pass 1: encode the segments at depth 0, each shared prompt once.

    Returns:
        The prefix cache, in the autograd graph unless gradients are off.

    Raises:
        As `response_logps`.
    """
    plan = batch.plan("two_pass")
    cache = PrefixCache()
    run_inside(model, partial(_run_passes, plan=plan, cache=cache, backend=backend, stop=1))
    return cache


def score_responses(model: nn.Module, batch: Batch, cache: PrefixCache, *, backend: str = "auto") -> ResponseLogps:
    """Pass 2 and, for deeper trees, the ones that follow: responses attend to the cache without copying it.

    Args:
        cache: From `encode_prefix` on the same batch; it is not changed and may be used again.

    Raises:
        InputError: If the cache was made from another batch or by another model.
        As `response_logps` otherwise.
    """
    plan = batch.plan("two_pass")
    if not cache.begins(plan):
        raise InputError("the prefix cache was made from another batch; use what encode_prefix returned for this one")
    unique_logps = run_inside(model, partial(_run_plan, plan=plan, backend=backend, cache=cache.fork()))
    return _gather(unique_logps, plan, batch)


def _gather(unique_logps: torch.Tensor, plan: ModePlan, batch: Batch) -> ResponseLogps:
    """Give each sequence the log-probs along its path."""
    token_logps = unique_logps.index_select(0, plan.token_index)
    return ResponseLogps(token_logps=token_logps, cu_seqlens=plan.cu_seqlens, group_index=batch.group_index)


def _run_plan(
    model: PreTrainedModel,
    *,
    plan: ModePlan,
    backend: str,
    cache: PrefixCache | None = None,
    checkpoint: str = "none",
) -> torch.Tensor:
    """All passes not yet in `cache`, then the LM head; (U,) log-probs of the unique scored tokens."""
    cache = PrefixCache() if cache is None else cache
    _run_passes(model, plan=plan, cache=cache, backend=backend, stop=len(plan.passes), checkpoint=checkpoint)
    with region("lm head"):
        return head_logps(model, torch.cat(cache.predictor_hidden), plan.targets)


def _run_passes(
    model: PreTrainedModel,
    *,
    plan: ModePlan,
    cache: PrefixCache,
    backend: str,
    stop: int,
    checkpoint: str = "none",
) -> None:
    check_training_state(model)
    passes = plan.passes[cache.num_passes : stop]
    embeds = _embed(model, passes)
    for item, embedded in zip(passes, embeds, strict=True):
        is_prefix = item is not plan.passes[-1]
        with (
            region(f"pass {cache.num_passes}"),
            checkpointed(model, checkpoints_pass(checkpoint, is_prefix=is_prefix)),
        ):
            if plan.mode == "padded":
                hidden = _backbone(model, item, embedded, attention_mask=item.attention_mask)
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
                )
        cache.close_pass(item, hidden.flatten(0, 1).index_select(0, item.predictor_rows))


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


def run_level_pass(
    model: PreTrainedModel,
    item: PassPlan,
    embeds: torch.Tensor,
    key_values: KeyValues,
    *,
    num_positions: int,
    backend: str,
    keep: bool,
) -> torch.Tensor:
    """Run one pass of the model's layers.

    Args:
        model: Attached model, in whose forward this runs.
        item: The pass.
        embeds: (1, T, hidden_size), its input embeddings.
        key_values: What it reads, and where its own keys and values go.
        num_positions: Length of the longest sequence, in tokens.
        backend: Attention backend, or ``auto``.
        keep: Whether later passes will read this one's keys and values.

    Returns:
        (1, T, hidden_size), the final hidden states.
    """
    running = RunningPass(
        item,
        key_values,
        num_layers=model.config.num_hidden_layers,
        num_positions=num_positions,
        backend=backend,
        keep=keep,
    )
    with bind_pass(running):
        # A 2-D mask of ones keeps transformers from guessing packed sequences from the positions, wrongly here.
        hidden = _backbone(model, item, embeds, attention_mask=torch.ones_like(item.input_ids))
    running.finish()
    return hidden


def _backbone(
    model: PreTrainedModel, item: PassPlan, embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    output = model.base_model(
        inputs_embeds=embeds,
        position_ids=item.position_ids,
        attention_mask=attention_mask,
        use_cache=False,
        return_dict=True,
    )
    hidden: torch.Tensor = output.last_hidden_state
    return hidden
