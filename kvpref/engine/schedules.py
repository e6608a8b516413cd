"""Forward and backward over a micro-batch, or over all those of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kvpref.engine.bounded import run_chunks, score_chunks
from kvpref.engine.options import SCHEDULES as SCHEDULES
from kvpref.engine.options import EngineOptions
from kvpref.engine.passes import batch_for, reads_of, response_logps, response_rewards
from kvpref.errors import InputError
from kvpref.losses import LossFunction, LossOutput, PreferenceLoss, as_loss, loss_name
from kvpref.parallel.ddp import local_module, synchronise_gradients
from kvpref.plan.batch import Batch
from kvpref.plan.step import Step, join_batches
from kvpref.records.outputs import ResponseLogps, ResponseRewards
from kvpref.records.requests import HeadOptions
from kvpref.tracing import region


def forward_backward(  # noqa: PLR0913 - the options of a run, by name
    model: nn.Module,
    batch: Batch,
    loss_fn: PreferenceLoss | LossFunction,
    *,
    reference: ResponseLogps | None = None,
    mode: str = "two_pass",
    schedule: str = "full",
    max_tokens_per_chunk: int | None = None,
    prefix_cache: str = "device",
    checkpoint: str = "none",
    prefix_grad: bool = True,
    backend: str = "auto",
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> LossOutput:
    """Compute a loss over a micro-batch and add its gradients to the parameters' `.grad`.

    Args:
        model: Attached model, possibly wrapped.
        batch: From `kvpref.collate`.
        loss_fn: ``loss_fn(policy, reference, batch) -> LossOutput``. It may couple responses in any way.
        reference: Reference log-probs of the same batch, handed to the loss.
        mode: As in `response_logps`.
        schedule: ``full`` keeps the whole graph of the micro-batch until its backward. ``bounded`` (mode ``two_pass``)
            keeps the activations of at most `max_tokens_per_chunk` tokens at once, and keys and values of prefixes:
            the same gradients, and memory that does not depend on the number of responses.
        max_tokens_per_chunk: For ``bounded``; 8192 if None.
        prefix_cache: For ``bounded``: where keys and values wait between chunks, ``device`` or ``cpu``.
        checkpoint: Which passes keep only the inputs of their layers: ``none``, ``prefix`` (passes whose keys and
            values others read) or ``all``. In training mode only.
        prefix_grad: False treats keys and values of prompts (tokens before the first scored one), and what their hidden
            states predict, as constants. That is *not* the gradient of the loss; it saves the prompts' backward.
        backend: Attention backend, or ``auto``.
        backward: What runs the backward pass of the loss; pass accelerate's, which scales for mixed precision. In
            ``bounded`` it stops at the log-probs, and what it leaves there is carried on to the parameters.

    Returns:
        The loss's output, detached.

    Raises:
        InputError: If an option is unknown or does not fit the others, or the loss does not return a scalar
            `LossOutput` with a gradient.
        UnsupportedModelError: If the model cannot run this schedule exactly.
        As `response_logps` otherwise.
    """
    options = EngineOptions(
        mode=mode,
        backend=backend,
        schedule=schedule,
        max_tokens_per_chunk=max_tokens_per_chunk,
        prefix_cache=prefix_cache,
        checkpoint=checkpoint,
        prefix_grad=prefix_grad,
    )
    loss = as_loss(loss_fn)
    batch = batch_for(model, batch, loss.reads)
    if options.runs_chunks:
        step = join_batches([batch], max_tokens_per_chunk=options.chunk_tokens, prefix_grad=prefix_grad)
        outputs = forward_backward_step(
            model, step, loss, options, references=[reference], backward=lambda total, _: backward(total)
        )
        return outputs[0]
    policy: ResponseLogps | ResponseRewards
    if loss.reads == "ends":
        policy = response_rewards(model, batch, mode=mode, backend=backend, checkpoint=checkpoint)
    else:
        policy = response_logps(model, batch, mode=mode, backend=backend, checkpoint=checkpoint, head=loss.head)
    return _differentiate(policy, reference, batch, loss, backward)


def forward_backward_step(
    model: nn.Module,
    step: Step,
    loss_fn: PreferenceLoss | LossFunction,
    options: EngineOptions,
    *,
    references: Sequence[ResponseLogps | None],
    backward: Callable[[torch.Tensor, int], None],
) -> list[LossOutput]:
    """Forward and backward of all micro-batches of an optimizer step, chunk by chunk.

    What several micro-batches share is encoded once, and its backward pass runs once, at the end, with what all of
    them leave: the weights do not change in between.

    Args:
        model: Attached model, possibly inside DistributedDataParallel, whose ranks are synchronised at the end.
        step: From `kvpref.plan.step.join`.
        loss_fn: As in `forward_backward`; called once per micro-batch.
        options: Those that `step` was joined for.
        references: Per micro-batch, its reference log-probs.
        backward: ``backward(loss, index)`` runs the backward pass of micro-batch `index`'s loss, weighted as its share
            of the step asks.

    Returns:
        Per micro-batch the loss's output, detached.

    Raises:
        As `forward_backward`.
    """
    limit = options.chunk_tokens
    if step.prefix_grad != options.prefix_grad or (limit is not None and step.chunks.max_chunk_tokens > limit):
        raise InputError(
            f"the step was joined with prefix_grad={step.prefix_grad} and chunks of up to "
            f"{step.chunks.max_chunk_tokens} tokens; join it again with prefix_grad={options.prefix_grad} and "
            f"max_tokens_per_chunk={limit}"
        )
    loss = as_loss(loss_fn)
    if step.batches[0].reads != reads_of(model, loss.reads):
        raise InputError(
            f"the step's batches read {step.batches[0].reads}, and the loss {reads_of(model, loss.reads)}; join "
            "`batch.reading(...)` of each"
        )
    outputs: list[LossOutput] = []

    def evaluate(index: int, policy: ResponseLogps | ResponseRewards) -> None:
        batch, reference = step.batches[index], references[index]
        outputs.append(_differentiate(policy, reference, batch, loss, lambda total: backward(total, index)))

    run_chunks(local_module(model), step, evaluate, options, loss.head)
    synchronise_gradients(model)
    return outputs


def _differentiate(
    policy: ResponseLogps | ResponseRewards,
    reference: ResponseLogps | None,
    batch: Batch,
    loss: PreferenceLoss,
    backward: Callable[[torch.Tensor], None],
) -> LossOutput:
    with region("loss"):
        output = check_output(loss(policy, reference, batch), loss)  # type: ignore[arg-type]
    with region("backward"):
        backward(output.loss)
    return LossOutput(loss=output.loss.detach(), metrics=output.metrics)


def score(
    model: nn.Module,
    batch: Batch,
    options: EngineOptions,
    *,
    head: HeadOptions | None = None,
    reads: str = "tokens",
) -> Any:
    """Log-probs (or rewards) without gradient, within the memory that `forward_backward` takes with these options.

    Args:
        model: Attached model.
        batch: From `kvpref.collate`.
        options: Mode and schedule.
        head: What is computed besides log-probs; nothing if None.
        reads: ``tokens`` for a `ResponseLogps`, ``ends`` for a `ResponseRewards`.

    Raises:
        As `forward_backward`.
    """
    head = head or HeadOptions()
    batch = batch_for(model, batch, reads)
    with torch.no_grad():
        if options.runs_chunks:
            step = join_batches([batch], max_tokens_per_chunk=options.chunk_tokens)
            return score_chunks(local_module(model), step, options, head)
        if reads == "ends":
            return response_rewards(model, batch, mode=options.mode, backend=options.backend)
        return response_logps(model, batch, mode=options.mode, backend=options.backend, head=head)


def check_output(output: LossOutput, loss_fn: PreferenceLoss | LossFunction) -> LossOutput:
    """Check what a loss returned; losses may be users' code.

    Raises:
        InputError: Naming the loss, if it is not a LossOutput with a scalar that has a gradient, and scalar metrics.
    """
    name = loss_name(loss_fn)
    if not isinstance(output, LossOutput):
        raise InputError(
            f"loss {name!r} must return a kvpref.LossOutput, or a scalar tensor; it returned {type(output).__name__}"
        )
    if not isinstance(output.loss, torch.Tensor) or output.loss.ndim != 0:
        raise InputError(f"loss {name!r} must return a scalar tensor as `loss`; it returned {output.loss!r:.80}")
    if not output.loss.requires_grad:
        raise InputError(f"loss {name!r} returned a loss without gradient; compute it from what the policy gives")
    if not isinstance(output.metrics, dict):
        raise InputError(f"loss {name!r} must return a dict as `metrics`; it returned {type(output.metrics).__name__}")
    for metric, value in output.metrics.items():
        if not isinstance(value, torch.Tensor) or value.ndim != 0:
            raise InputError(f"loss {name!r}: metric {metric!r} must be a scalar tensor; it is {value!r:.80}")
    return output
