"""Run the passes of a mode and score the responses: the engine's public functions."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.engine.level_pass import run_level_pass
from kvpref.engine.options import EngineOptions
from kvpref.errors import InputError
from kvpref.models.attach import run_inside
from kvpref.models.backbone import run_backbone
from kvpref.models.checkpointing import checkpointed, checkpoints_pass
from kvpref.models.head import head_outputs
from kvpref.models.head_form import is_reward_model
from kvpref.models.rotary import check_lengths
from kvpref.models.support import check_training_state, unwrap
from kvpref.plan.batch import Batch
from kvpref.plan.chunks import MicroBatchChunks
from kvpref.plan.passes import ModePlan, PassPlan, Reads
from kvpref.records.outputs import ResponseLogps, ResponseRewards, Responses
from kvpref.records.requests import HeadOptions
from kvpref.state.cache import PrefixCache
from kvpref.tracing import region


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
    batch = batch_for(model, batch, reads)
    plan = batch.plan(options.mode)
    program = partial(
        _run_plan, plan=plan, backend=options.backend, checkpoint=options.checkpoint, head=head or HeadOptions()
    )
    return responses(run_inside(model, program), plan, batch)


def batch_for(model: nn.Module, batch: Batch, reads: str) -> Batch:
    """The batch whose plans read what a loss reads from this model.

    Raises:
        InputError: If the model has another head.
        UnsupportedModelError: If lengths of sequences lead to different rotary embeddings.
    """
    check_lengths(unwrap(model), batch.groups)
    return batch.reading(reads_of(model, reads))


def reads_of(model: nn.Module, reads: str) -> Reads:
    """Which hidden states are read for ``tokens`` (log-probs) or ``ends`` (rewards) of a model.

    Raises:
        InputError: If the model has another head.
    """
    inner = unwrap(model)
    if reads == "ends" and not is_reward_model(inner):
        raise InputError(
            f"rewards need a model with a scalar head; {type(inner).__name__} has none. Load it with "
            "AutoModelForSequenceClassification and num_labels=1"
        )
    if reads == "tokens" and is_reward_model(inner):
        raise InputError(
            f"log-probs need a language model; {type(inner).__name__} has a scalar head instead of an LM head. Use a "
            "loss of rewards (bradley_terry, say) or kvpref.response_rewards"
        )
    # Configs of several parts keep it with the text's.
    pad_token_id = getattr(inner.config.get_text_config(), "pad_token_id", None)
    return Reads(kind=reads, pad_token_id=pad_token_id if reads == "ends" else None)


def encode_prefix(model: nn.Module, batch: Batch, *, backend: str = "auto") -> PrefixCache:
    """Pass 1: encode the segments at depth 0, each shared prompt once.

    Returns:
        The prefix cache, in the autograd graph unless gradients are off.

    Raises:
        As `response_logps`.
    """
    EngineOptions(backend=backend)
    plan = batch_for(model, batch, "tokens").plan("two_pass")
    cache = PrefixCache()
    run_inside(model, partial(_run_passes, plan=plan, cache=cache, backend=backend, stop=1))
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
    program = partial(_run_plan, plan=plan, backend=backend, cache=cache.fork(), head=head or HeadOptions())
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
    backend: str,
    head: HeadOptions,
    cache: PrefixCache | None = None,
    checkpoint: str = "none",
) -> dict[str, torch.Tensor]:
    """All passes not yet in `cache`, then the head; what it makes of the U unique rows that are read."""
    cache = PrefixCache() if cache is None else cache
    _run_passes(model, plan=plan, cache=cache, backend=backend, stop=len(plan.passes), checkpoint=checkpoint)
    with region("lm head"):
        return head_outputs(model, torch.cat(cache.predictor_hidden), plan.targets, head)


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
                hidden = run_backbone(model, item, embedded, attention_mask=item.attention_mask)
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
