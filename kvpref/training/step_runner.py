"""Runs the micro-batches of one batched step: weights them, counts, and reacts if memory runs out."""

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
from kvpref.parallel.deepspeed import held, is_engine, whole_weights
from kvpref.parallel.recovery import FailedElsewhereError, repeatable
from kvpref.parallel.sharding import is_sharded
from kvpref.parallel.wrapping import wrapper_of
from kvpref.plan.batch import Batch
from kvpref.plan.step import Step
from kvpref.records.outputs import ResponseLogps, ResponseRewards
from kvpref.training.loading.inputs import MicroBatchInputs, StepInputs, join_micro_batches
from kvpref.training.memory import advice, is_out_of_memory
from kvpref.training.units import Weight, weighted

ReferenceOf = Callable[[MicroBatchInputs, Batch], ResponseLogps | None]


@dataclass(frozen=True, kw_only=True)
class RunnerSettings:
    """Settings that stay the same from step to step."""

    options: EngineOptions
    """How forward and backward run."""

    max_tokens_per_micro_batch: int | None
    """In schedule ``full``, the chunk size of a group that exceeds it by itself; also used in advice on memory."""

    larger_in_chunks: bool
    """Whether such a group runs in chunks."""

    shares: bool
    """Whether the micro-batches of a step share common prefixes (schedule ``bounded``)."""

    auto_budget: bool
    """Whether to halve the chunk and repeat the step when memory runs out."""

    report: Callable[[str], None]
    """Takes lines for the user."""


@dataclass(kw_only=True)
class StepResult:
    """The results of a step, micro-batch by micro-batch."""

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
        loss: The loss to minimise.
        settings: Options and limits. The chunk may shrink and then stays smaller.
    """

    def __init__(self, accelerator: Accelerator, loss: PreferenceLoss, settings: RunnerSettings) -> None:
        self.accelerator, self.loss, self.settings = accelerator, loss, settings

    def run(self, model: nn.Module, inputs: StepInputs, weights: list[Weight], reference_of: ReferenceOf) -> StepResult:
        """Run all micro-batches of a step, adding to the parameters' gradients.

        Args:
            model: The model as wrapped by the trainer.
            inputs: The step.
            weights: Per micro-batch, the factor on its loss.
            reference_of: Gives a micro-batch's reference log-probs.

        Raises:
            RunError: If memory runs out; the message says what to lower.
            As `kvpref.forward_backward` otherwise.
        """
        with whole_weights(model):
            return self._run(model, inputs, weights, reference_of)

    def _run(
        self, model: nn.Module, inputs: StepInputs, weights: list[Weight], reference_of: ReferenceOf
    ) -> StepResult:
        run = self._run_joined if self.settings.options.runs_chunks else self._run_each
        while True:
            with repeatable() if self.settings.auto_budget else contextlib.nullcontext() as step:
                try:
                    return run(model, inputs, weights, reference_of)
                except FailedElsewhereError:
                    message = "out of memory on another rank"
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    message = f"out of memory: {error}"
                    if step is not None and step.is_over:
                        raise self._give_up(message) from error  # other ranks are past this step
                    if step is not None:
                        step.fail()
            # Outside `except`: the error keeps the failed frames, and thus their tensors, alive.
            self._make_room(model, message)

    def _run_each(
        self, model: nn.Module, inputs: StepInputs, weights: list[Weight], reference_of: ReferenceOf
    ) -> StepResult:
        result = StepResult()
        for index, (item, weight) in enumerate(zip(inputs, weights, strict=True)):
            batch = item.batch.to(self.accelerator.device)
            options, num_tokens = self._options_for(batch)
            with self._local_unless(index == len(weights) - 1, model):
                output = forward_backward(
                    model,
                    batch,
                    self._recording(result),
                    options,
                    reference=reference_of(item, batch),
                    backward=lambda loss, weight=weight: self._backward(model, weighted(loss, weight)),  # type: ignore[misc]
                )
            result.outputs.append(output)
            result.num_forward_tokens.append(num_tokens)
        return result

    def _options_for(self, batch: Batch) -> tuple[EngineOptions, int]:
        """A micro-batch's options and number of tokens to run; a group that alone exceeds the budget runs in chunks."""
        options, limit = self.settings.options, self.settings.max_tokens_per_micro_batch
        is_larger = limit is not None and options.mode == "two_pass" and batch.num_unique_tokens > limit
        if is_larger and self.settings.larger_in_chunks:
            options = replace(options, schedule="bounded", max_tokens_per_chunk=limit)
            return options, batch.num_unique_tokens
        return options, batch.plan(options.mode).num_forward_tokens

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
                    backward=lambda loss, index, own=own_weights: self._backward(model, weighted(loss, own[index])),  # type: ignore[misc]
                )
            result.num_forward_tokens += step.chunks.num_tokens_by_micro_batch()
            first = part.stop
        return result

    def _fitting(self, inputs: StepInputs) -> tuple[Step, ...]:
        """The step as planned ahead, or replanned if the chunk has shrunk since."""
        limit = self.settings.options.chunk_tokens
        if limit is None or all(step.chunks.max_chunk_tokens <= limit for step in inputs.joined):
            return inputs.joined
        batches = [item.batch for item in inputs]
        return join_micro_batches(batches, self.settings.options, shares=self.settings.shares)

    def _recording(self, result: StepResult) -> PreferenceLoss:
        return RecordingLoss(self.loss, lambda policy: result.sequence_values.append(_sequence_values(policy)))

    def _backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        if is_engine(model):
            loss.backward()  # accelerate's would also let the engine update the weights after each micro-batch
        else:
            self.accelerator.backward(loss)

    def _local_unless(self, is_last: bool, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Keep gradients on this rank until the step's last micro-batch, unless shards reduce them at once."""
        if is_engine(model):  # transformers opens no `no_sync` for these either
            return contextlib.nullcontext() if is_last and self.accelerator.sync_gradients else held(model)
        at_once = self.settings.options.reduce_grads == "chunk" and is_sharded(model)
        return contextlib.nullcontext() if is_last or at_once else self.accelerator.no_sync(model)

    def _make_room(self, model: nn.Module, message: str) -> None:
        """Halve the chunk and drop what the failed step left, or give up with advice."""
        options = self.settings.options
        if not self.settings.auto_budget or options.chunk_tokens in (None, 1):
            raise self._give_up(message)
        assert options.chunk_tokens is not None
        smaller = options.chunk_tokens // 2
        self.settings = replace(self.settings, options=replace(options, max_tokens_per_chunk=smaller))
        wrapper_of(model, options.sharding).discard()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.settings.report(
            f"out of memory with max_tokens_per_chunk {options.chunk_tokens}; repeating the step with {smaller}"
        )

    def _give_up(self, message: str) -> RunError:
        hint = advice(self.settings.options, self.settings.max_tokens_per_micro_batch)
        return RunError(f"{message}. Earlier checkpoints are intact. To need less memory: {hint}")


def _sequence_values(policy: ResponseLogps | ResponseRewards) -> torch.Tensor:
    """The log-prob or reward of each response, (num_sequences,), detached."""
    return (policy.rewards if isinstance(policy, ResponseRewards) else policy.sum()).detach()
