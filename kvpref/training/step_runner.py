"""Runs the micro-batches of one batched step: weights them, keeps count, and answers when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import nn

from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import forward_backward, forward_backward_step
from kvpref.errors import RunError
from kvpref.losses import LossOutput, PreferenceLoss
from kvpref.losses.recording import RecordingLoss
from kvpref.plan.batch import Batch
from kvpref.plan.step import Step
from kvpref.records.outputs import ResponseLogps, ResponseRewards
from kvpref.training.loading.inputs import MicroBatchInputs, StepInputs, join_micro_batches
from kvpref.training.memory import advice, is_out_of_memory
from kvpref.training.units import Weight, weighted

ReferenceOf = Callable[[MicroBatchInputs, Batch], ResponseLogps | None]


@dataclass(frozen=True, kw_only=True)
class RunnerSettings:
    """What stays the same from step to step."""

    options: EngineOptions
    """How forward and backward run."""

    max_tokens_per_micro_batch: int | None
    """For advice when memory runs out."""

    shares: bool
    """Whether the micro-batches of a step share what they have in common (schedule ``bounded``)."""

    auto_budget: bool
    """Whether to halve the chunk and repeat the step when memory runs out."""

    report: Callable[[str], None]
    """Takes lines for the user."""


@dataclass(kw_only=True)
class StepResult:
    """What came out of a step, micro-batch by micro-batch."""

    outputs: list[LossOutput] = field(default_factory=list)
    """Loss and metrics, not weighted."""

    sequence_values: list[torch.Tensor] = field(default_factory=list)
    """(num_sequences,) log-prob or reward of each response, detached."""

    num_forward_tokens: list[int] = field(default_factory=list)
    """Tokens that ran through the layers."""


class StepRunner:
    """Forward and backward of batched steps.

    Args:
        accelerator: Scales losses, and keeps distributed wrappers from synchronising too early.
        loss: What is minimised.
        settings: Options and limits. The chunk may shrink, and stays so.
    """

    def __init__(self, accelerator: Accelerator, loss: PreferenceLoss, settings: RunnerSettings) -> None:
        self.accelerator, self.loss, self.settings = accelerator, loss, settings

    def run(self, model: nn.Module, inputs: StepInputs, weights: list[Weight], reference_of: ReferenceOf) -> StepResult:
        """Run all micro-batches of a step, adding to the parameters' gradients.

        Args:
            model: As the trainer wrapped it.
            inputs: The step.
            weights: Per micro-batch, the factor on its loss.
            reference_of: Its reference log-probs.

        Raises:
            RunError: If memory runs out; the message says what to lower.
            As `kvpref.forward_backward` otherwise.
        """
        while True:
            try:
                if self.settings.options.runs_chunks:
                    return self._run_joined(model, inputs, weights, reference_of)
                return self._run_each(model, inputs, weights, reference_of)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                message = f"out of memory: {error}"
            # Outside `except`: the error holds the frames, and they the tensors, of what failed.
            self._make_room(model, message)

    def _run_each(
        self, model: nn.Module, inputs: StepInputs, weights: list[Weight], reference_of: ReferenceOf
    ) -> StepResult:
        result, options = StepResult(), self.settings.options
        for index, (item, weight) in enumerate(zip(inputs, weights, strict=True)):
            batch = item.batch.to(self.accelerator.device)
            with self._local_unless(index == len(weights) - 1, model):
                output = forward_backward(
                    model,
                    batch,
                    self._recording(result),
                    options,
                    reference=reference_of(item, batch),
                    backward=lambda loss, weight=weight: self.accelerator.backward(weighted(loss, weight)),  # type: ignore[misc]
                )
            result.outputs.append(output)
            result.num_forward_tokens.append(batch.plan(options.mode).num_forward_tokens)
        return result

    def _run_joined(
        self, model: nn.Module, inputs: StepInputs, weights: list[Weight], reference_of: ReferenceOf
    ) -> StepResult:
        result = StepResult()
        first = 0
        steps = self._fitting(inputs)
        for number, step in enumerate(steps):
            step = step.to(self.accelerator.device)
            part = slice(first, first + len(step.batches))
            own_weights = weights[part]
            references = [
                reference_of(item, batch) for item, batch in zip(inputs.micro_batches[part], step.batches, strict=True)
            ]
            with self._local_unless(number == len(steps) - 1, model):
                result.outputs += forward_backward_step(
                    model,
                    step,
                    self._recording(result),
                    self.settings.options,
                    references=references,
                    backward=lambda loss, index, own=own_weights: self.accelerator.backward(weighted(loss, own[index])),  # type: ignore[misc]
                )
            result.num_forward_tokens += step.chunks.num_tokens_by_micro_batch()
            first = part.stop
        return result

    def _fitting(self, inputs: StepInputs) -> tuple[Step, ...]:
        """The step as it was planned ahead, or planned anew if the chunk has shrunk since."""
        limit = self.settings.options.chunk_tokens
        if limit is None or all(step.chunks.max_chunk_tokens <= limit for step in inputs.joined):
            return inputs.joined
        batches = [item.batch for item in inputs]
        return join_micro_batches(batches, self.settings.options, shares=self.settings.shares)

    def _recording(self, result: StepResult) -> PreferenceLoss:
        return RecordingLoss(self.loss, lambda policy: result.sequence_values.append(_sequence_values(policy)))

    def _local_unless(self, is_last: bool, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(model)

    def _make_room(self, model: nn.Module, message: str) -> None:
        """Halve the chunk and forget what the failed step left, or give up with advice."""
        options = self.settings.options
        if not self.settings.auto_budget or options.chunk_tokens in (None, 1):
            hint = advice(options, self.settings.max_tokens_per_micro_batch)
            raise RunError(f"{message}. Earlier checkpoints are intact. To need less memory: {hint}")
        assert options.chunk_tokens is not None
        smaller = options.chunk_tokens // 2
        self.settings = replace(self.settings, options=replace(options, max_tokens_per_chunk=smaller))
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.settings.report(
            f"out of memory with max_tokens_per_chunk {options.chunk_tokens}; repeating the step with {smaller}"
        )


def _sequence_values(policy: ResponseLogps | ResponseRewards) -> torch.Tensor:
    """The log-prob or reward of each response, (num_sequences,), detached."""
    return (policy.rewards if isinstance(policy, ResponseRewards) else policy.sum()).detach()
