"""One training step as it is timed: forward and backward of every micro-batch, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from kvpref.engine.options import EngineOptions
from kvpref.engine.passes import response_logps
from kvpref.engine.reads import reads_of
from kvpref.engine.schedules import forward_backward
from kvpref.losses import LossFunction, LossOutput, PreferenceLoss, as_loss
from kvpref.losses.recording import RecordingLoss
from kvpref.models.shape import model_shape
from kvpref.models.vision.flops import VisionFlops
from kvpref.plan.batch import Batch, collate
from kvpref.plan.flops import Flops, Work, count_work, total_work
from kvpref.prefix.rules import Rule
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps, ResponseRewards
from kvpref.records.requests import HeadOptions

BASELINE_MODE = "packed"
"""The baseline of modes: the same kernels and no padding, with every prompt repeated."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepMicroBatch:
    """One micro-batch of a step."""

    batch: Batch
    """Its groups, collated, on the model's device."""

    reference: ResponseLogps | None
    """Reference log-probs, if the loss needs any."""

    weight: float
    """Its share of the step's loss units, so that the step's loss does not depend on how it is cut."""


class StepOutcome(NamedTuple):
    """The results of a step; equal in every mode, up to rounding."""

    loss: float
    """Loss of the whole step."""

    mean_token_logp: float
    """Mean log-prob of the scored tokens, in nats, or mean reward; the loss can hide an error in both responses."""


class TrainStep:
    """A step that can be run again and again.

    Args:
        model: Attached model.
        loss: As for `kvpref.forward_backward`.
        micro_batches: The micro-batches, run one after another.
        mode: As in `kvpref.response_logps`.
        optimizer: Stepped at the end of each run; None leaves the weights unchanged.
        options: How it runs in this mode; the defaults if None.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PreferenceLoss | LossFunction,
        micro_batches: Sequence[StepMicroBatch],
        mode: str,
        optimizer: torch.optim.Optimizer | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self.model, self.loss, self.mode, self.optimizer = model, as_loss(loss), mode, optimizer
        self.micro_batches = tuple(micro_batches)
        self.options = replace(options or EngineOptions(), mode=mode)

    def run(self) -> torch.Tensor:
        """Zero the gradients, run every micro-batch, step the optimizer; the step's loss, detached, on the device."""
        self.model.zero_grad(set_to_none=True)
        losses = [self._forward_backward(item, self.loss).loss * item.weight for item in self.micro_batches]
        if self.optimizer is not None:
            self.optimizer.step()
        return torch.stack(losses).sum()

    def check(self) -> StepOutcome:
        """Run every micro-batch without the optimizer and return the results."""
        self.model.zero_grad(set_to_none=True)
        seen: list[torch.Tensor] = []
        recording = RecordingLoss(self.loss, lambda policy: seen.append(_values(policy)))
        outputs = [self._forward_backward(item, recording) for item in self.micro_batches]
        loss = sum(output.loss.item() * item.weight for output, item in zip(outputs, self.micro_batches, strict=True))
        self.model.zero_grad(set_to_none=True)
        values = torch.cat(seen)
        return StepOutcome(loss, float(values.sum()) / max(1, values.numel()))

    def work(self, rules: Iterable[Rule] = ()) -> Work:
        """Counts of what one run computes, also for attention under these rules."""
        return total_work(count_work(item.batch.plan(self.mode), rules) for item in self.micro_batches)

    def flops(self) -> Flops:
        """FLOPs of one run without recomputation; image towers run once per step to count them."""
        shape, vision = model_shape(self.model), VisionFlops(self.model)
        images = sum(
            vision.of(item.batch.plan(self.mode).images, item.batch.image_inputs()) for item in self.micro_batches
        )
        return shape.flops(self.work(shape.rules))._replace(vision=images)

    def resident_bytes(self) -> int:
        """Current bytes of the weights, the buffers and the optimizer's state."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        kept = [value for values in state for value in values.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *kept))

    def _forward_backward(self, item: StepMicroBatch, loss: PreferenceLoss | LossFunction) -> LossOutput:
        return forward_backward(
            self.model,
            item.batch,
            loss,
            self.options,
            reference=item.reference,
            backward=lambda value: (value * item.weight).backward(),  # type: ignore[no-untyped-call]
        )


def make_micro_batches(
    model: nn.Module,
    cut: Sequence[Sequence[Group]],
    loss: PreferenceLoss | LossFunction,
    *,
    mode: str,
    device: torch.device,
) -> tuple[StepMicroBatch, ...]:
    """Collate the micro-batches of a step and compute the reference log-probs with the current weights.

    Args:
        model: Attached model; it is its own reference.
        cut: The groups of each micro-batch.
        loss: Its units weight the micro-batches; it decides whether a reference is needed.
        mode: The mode to build plans for.
        device: The device of the tensors.
    """
    wrapped = as_loss(loss)
    reads = reads_of(model, wrapped.reads)
    batches = [collate(groups, device=device, modes=(mode,), reads=reads) for groups in cut]
    units = [wrapped.num_units(batch) for batch in batches]
    return tuple(
        StepMicroBatch(
            batch=batch,
            reference=_reference(model, batch, wrapped.head) if wrapped.needs_reference else None,
            weight=count / max(1, sum(units)),
        )
        for batch, count in zip(batches, units, strict=True)
    )


@torch.no_grad()
def _reference(model: nn.Module, batch: Batch, head: HeadOptions) -> ResponseLogps:
    # The same mode for all: a mode with its own reference would cancel its own error.
    return response_logps(model, batch, mode=BASELINE_MODE, head=HeadOptions(temperature=head.temperature))


def _values(policy: ResponseLogps | ResponseRewards) -> torch.Tensor:
    """The values a loss reads, log-probs of tokens or rewards; one-dimensional, float64."""
    values = policy.rewards if isinstance(policy, ResponseRewards) else policy.token_logps
    return values.detach().double()
