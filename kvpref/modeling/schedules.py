"""One forward and backward over a micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kvpref.batch import Batch, ResponseLogps
from kvpref.errors import InputError
from kvpref.losses import LossFunction, LossOutput, PreferenceLoss
from kvpref.modeling.passes import response_logps
from kvpref.regions import region

SCHEDULES = ("full",)


def forward_backward(
    model: nn.Module,
    batch: Batch,
    loss_fn: PreferenceLoss | LossFunction,
    *,
    reference: ResponseLogps | None = None,
    mode: str = "two_pass",
    schedule: str = "full",
    backend: str = "auto",
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> LossOutput:
    """Compute a loss over a micro-batch and add its gradients to the parameters' `.grad`.

    Args:
        model: Attached model, possibly wrapped.
        batch: From `kvpref.collate`.
        loss_fn: ``loss_fn(policy, reference, batch) -> LossOutput``.
        reference: Reference log-probs of the same batch, handed to the loss.
        mode: As in `response_logps`.
        schedule: ``full`` keeps the whole graph of the micro-batch until its backward.
        backend: Attention backend, or ``auto``.
        backward: What runs the backward pass; the trainer passes accelerate's, which scales for mixed precision.

    Returns:
        The loss's output, detached.

    Raises:
        InputError: If the schedule is unknown, or the loss does not return a scalar `LossOutput` with a gradient.
        As `response_logps` otherwise.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {schedule!r}; choose from: {', '.join(SCHEDULES)}")
    policy = response_logps(model, batch, mode=mode, backend=backend)
    with region("loss"):
        output = check_output(loss_fn(policy, reference, batch), loss_fn)
    with region("backward"):
        backward(output.loss)
    return LossOutput(loss=output.loss.detach(), metrics=output.metrics)


def check_output(output: LossOutput, loss_fn: PreferenceLoss | LossFunction) -> LossOutput:
    """Check what a loss returned; losses may be users' code.

    Raises:
        InputError: Naming the loss, if it is not a LossOutput with a scalar that has a gradient.
    """
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    if not isinstance(output, LossOutput):
        raise InputError(f"loss {name!r} must return a kvpref.LossOutput; it returned {type(output).__name__}")
    if not isinstance(output.loss, torch.Tensor) or output.loss.ndim != 0:
        raise InputError(f"loss {name!r} must return a scalar tensor as `loss`; it returned {output.loss!r:.80}")
    if not output.loss.requires_grad:
        raise InputError(f"loss {name!r} returned a loss without gradient; compute it from the policy's log-probs")
    return output
