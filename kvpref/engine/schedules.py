"""Forward and backward over a micro-batch, or over all micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import nn

from kvpref.engine.bounded import run_chunks, score_chunks
from kvpref.engine.options import SCHEDULES as SCHEDULES
from kvpref.engine.options import EngineOptions, with_changes
from kvpref.engine.passes import run_mode, run_with_routers
from kvpref.engine.reads import batch_for, reads_of
from kvpref.errors import InputError, UnsupportedModelError
from kvpref.losses import LossFunction, LossOutput, PreferenceLoss, as_loss, loss_name
from kvpref.models.compilation import is_compiled
from kvpref.models.support import unwrap
from kvpref.parallel.wrapping import wrapper_of
from kvpref.plan.batch import Batch
from kvpref.plan.step import Step, join_batches
from kvpref.records.outputs import ResponseLogps, ResponseRewards, Responses
from kvpref.records.requests import HeadOptions
from kvpref.tracing import region


def forward_backward(
    model: nn.Module,
    batch: Batch,
    loss_fn: PreferenceLoss | LossFunction,
    options: EngineOptions | None = None,
    *,
    reference: ResponseLogps | None = None,
    backward: Callable[[torch.Tensor], None] | None = None,
    **changes: Any,
) -> LossOutput:
    """Compute a loss over a micro-batch and add its gradients to the parameters' `.grad`.

    In schedule ``full`` the whole graph of the micro-batch is kept until its backward. ``bounded`` (mode ``two_pass``)
    keeps the activations of at most `max_tokens_per_chunk` tokens at once, and keys and values of prefixes: the same
    gradients, and memory that does not depend on the number of responses.

    Args:
        model: Attached model, possibly wrapped.
        batch: From `kvpref.collate`.
        loss_fn: ``loss_fn(policy, reference, batch) -> LossOutput``. It may couple responses in any way.
        options: How it runs; the defaults of `EngineOptions` if None.
        reference: Reference log-probs of the same batch, passed to the loss.
        backward: What runs the backward pass of the loss, ``loss.backward()`` if None; pass accelerate's, which scales
            for mixed precision. In ``bounded`` it stops at the log-probs, and the gradients it leaves there are
            propagated to the parameters.
        **changes: Fields of `EngineOptions` that override those in `options`: ``mode``, ``schedule``,
            ``max_tokens_per_chunk``, ``prefix_cache``, ``checkpoint``, ``prefix_grad``, ``backend``.

    Returns:
        The loss's output, detached.

    Raises:
        InputError: If an option is unknown or does not fit the others, or the loss does not return a scalar
            `LossOutput` with a gradient; otherwise as `response_logps`.
        UnsupportedModelError: If the model cannot run this schedule exactly; otherwise as `response_logps`.
    """
    options, loss = with_changes(options, changes), as_loss(loss_fn)
    _check_router_loss(model, options)
    run_backward = backward or torch.Tensor.backward
    batch = batch_for(model, batch, loss.reads)
    if options.runs_chunks:
        step = join_batches([batch], max_tokens_per_chunk=options.chunk_tokens, prefix_grad=options.prefix_grad)
        outputs = forward_backward_step(
            model, step, loss, options, references=[reference], backward=lambda total, _: run_backward(total)
        )
        return outputs[0]
    with wrapper_of(model).micro_batch():
        policy, balance_loss = run_with_routers(model, batch, options, loss.reads, head=loss.head)
        return _differentiate(policy, reference, batch, _balanced(loss, options, balance_loss), run_backward)


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

    Tokens that several micro-batches share are encoded once, and their backward pass runs once, at the end, with the
    gradients from all of them: the weights do not change in between.

    Args:
        model: Attached model, possibly inside DistributedDataParallel, whose ranks are synchronised at the end.
        step: From `kvpref.plan.step.join_batches`.
        loss_fn: As in `forward_backward`; called once per micro-batch.
        options: The options that `step` was joined for.
        references: The reference log-probs of each micro-batch.
        backward: ``backward(loss, index)`` runs the backward pass of micro-batch `index`'s loss, weighted by its share
            of the step.

    Returns:
        The loss's output for each micro-batch, detached.

    Raises:
        InputError: If the step was joined for other options; otherwise as `forward_backward`.
        UnsupportedModelError: As `forward_backward`.
    """
    _check_router_loss(model, options)
    limit = options.chunk_tokens
    too_long = limit is not None and step.chunks.max_chunk_tokens > max(limit, step.chunks.longest_span)
    if step.prefix_grad != options.prefix_grad or too_long:
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

    def evaluate(index: int, policy: Responses, balance_loss: torch.Tensor | None) -> None:
        batch, reference = step.batches[index], references[index]
        whole = _balanced(loss, options, balance_loss)
        outputs.append(_differentiate(policy, reference, batch, whole, lambda total: backward(total, index)))

    run_chunks(model, step, evaluate, options, loss.head)
    return outputs


def _check_router_loss(model: nn.Module, options: EngineOptions) -> None:
    if options.router_aux_loss_coef is not None and is_compiled(unwrap(model)):
        raise UnsupportedModelError(
            "router_aux_loss_coef reads router logits inside the layers, which compiled layers do not return; use "
            "one without the other"
        )


def _balanced(loss: PreferenceLoss, options: EngineOptions, balance_loss: torch.Tensor | None) -> LossFunction:
    """The loss, plus the load-balancing loss if there is one."""
    coefficient = options.router_aux_loss_coef
    if balance_loss is None or coefficient is None:
        return loss

    def balanced(policy: Any, reference: Any, batch: Batch) -> LossOutput:
        output = check_output(loss(policy, reference, batch), loss)
        return LossOutput(
            loss=output.loss + coefficient * balance_loss.to(output.loss),
            metrics={**output.metrics, "router_aux_loss": balance_loss.detach()},
        )

    return balanced


def _differentiate(
    policy: Responses,
    reference: ResponseLogps | None,
    batch: Batch,
    loss: PreferenceLoss | LossFunction,
    backward: Callable[[torch.Tensor], None],
) -> LossOutput:
    with region("loss"):
        output = check_output(loss(policy, reference, batch), loss)  # type: ignore[arg-type]
    with region("backward"):
        backward(output.loss)
    return LossOutput(loss=output.loss.detach(), metrics=output.metrics)


@overload
def score(
    model: nn.Module, batch: Batch, options: EngineOptions, *, head: HeadOptions | None = None
) -> ResponseLogps: ...


@overload
def score(model: nn.Module, batch: Batch, options: EngineOptions, *, reads: Literal["ends"]) -> ResponseRewards: ...


@overload
def score(
    model: nn.Module, batch: Batch, options: EngineOptions, *, head: HeadOptions | None = None, reads: str
) -> Responses: ...


def score(
    model: nn.Module, batch: Batch, options: EngineOptions, *, head: HeadOptions | None = None, reads: str = "tokens"
) -> Responses:
    """Log-probs (or rewards) without gradient, within the memory of `forward_backward` under these options.

    Args:
        model: Attached model.
        batch: From `kvpref.collate`.
        options: Mode and schedule.
        head: What to compute besides log-probs; nothing if None.
        reads: ``tokens`` for a `ResponseLogps`, ``ends`` for a `ResponseRewards`.

    Raises:
        As `forward_backward`.
    """
    batch = batch_for(model, batch, reads)
    with torch.no_grad():
        if options.runs_chunks:
            step = join_batches([batch], max_tokens_per_chunk=options.chunk_tokens)
            options = replace(options, router_aux_loss_coef=None)
            return score_chunks(model, step, options, head or HeadOptions())
        return run_mode(model, batch, replace(options, checkpoint="none"), reads, head=head)


def check_output(output: LossOutput, loss_fn: PreferenceLoss | LossFunction) -> LossOutput:
    """Check a loss's return value; losses may be users' code.

    Raises:
        InputError: Naming the loss, if it is not a LossOutput with scalar metrics and a scalar loss with a gradient.
    """
    name = loss_name(loss_fn)
    if not isinstance(output, LossOutput):
        raise InputError(
            f"loss {name!r} must return a kvpref.LossOutput, or a scalar tensor; it returned {type(output).__name__}"
        )
    if not isinstance(output.loss, torch.Tensor) or output.loss.ndim != 0:
        raise InputError(f"loss {name!r} must return a scalar tensor as `loss`; it returned {output.loss!r:.80}")
    if not output.loss.requires_grad:
        raise InputError(f"loss {name!r} returned a loss without gradient; compute it from the policy's outputs")
    if not isinstance(output.metrics, dict):
        raise InputError(f"loss {name!r} must return a dict as `metrics`; it returned {type(output.metrics).__name__}")
    for metric, value in output.metrics.items():
        if not isinstance(value, torch.Tensor) or value.ndim != 0:
            raise InputError(f"loss {name!r}: metric {metric!r} must be a scalar tensor; it is {value!r:.80}")
    return output
