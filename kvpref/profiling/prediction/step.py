"""A training step on fake tensors: runs the engine's own code and counts the bytes held after every operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from kvpref.engine.options import EngineOptions
from kvpref.engine.reads import batch_for
from kvpref.engine.schedules import forward_backward, forward_backward_step
from kvpref.errors import InputError
from kvpref.losses import LossOutput
from kvpref.plan.batch import Batch, collate
from kvpref.plan.step import join_batches
from kvpref.profiling.memory.tracker import OPTIMIZER, MemoryTracker
from kvpref.profiling.prediction import fake_results
from kvpref.profiling.prediction.images import PromptStart
from kvpref.profiling.prediction.integers import RealIntegers
from kvpref.profiling.prediction.kernels import running_on
from kvpref.profiling.prediction.model import FakeTraining
from kvpref.records.groups import Group
from kvpref.records.groups import Sequence as TokenSequence
from kvpref.records.outputs import ResponseLogps
from kvpref.tracing import current_region


@dataclass(frozen=True, kw_only=True)
class GroupShape:
    """The shape of made-up groups: one prompt with several responses each.

    Raises:
        InputError: If a length is not positive, or a prompt's images are longer than the prompt.
    """

    prompt_tokens: int
    response_tokens: int
    num_responses: int
    start: PromptStart | None = None
    """Images that prompts begin with."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "response_tokens", "num_responses"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.start is not None and self.start.num_tokens > self.prompt_tokens:
            raise InputError(
                f"prompts of {self.prompt_tokens} tokens cannot hold their images, which end at token "
                f"{self.start.num_tokens}; raise --prompt-tokens"
            )

    def to_json(self) -> dict[str, int]:
        found = {name: getattr(self, name) for name in ("prompt_tokens", "response_tokens", "num_responses")}
        if self.start is None:
            return found
        return {**found, "num_images": len(self.start.images), "image_tokens": self.start.num_image_tokens}

    @property
    def unique_tokens(self) -> int:
        return self.prompt_tokens + self.num_responses * self.response_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of one group, with the prompt counted once per response."""
        return self.num_responses * (self.prompt_tokens + self.response_tokens)

    def batch(self, num_groups: int, *, ragged: bool = False) -> Batch:
        """Collated groups that share nothing with one another.

        Args:
            num_groups: Number of groups.
            ragged: Make one response a token shorter, so that a padded batch has padding.
        """
        groups = []
        for group in range(num_groups):
            filler, *firsts = self._token_ids()
            start = self.start
            prompt = [group] if start is None else list(start.input_ids)
            prompt += [filler] * (self.prompt_tokens - len(prompt))
            responses = [[first, *[filler] * (self.response_tokens - 1)] for first in firsts]
            if ragged and group == 0 and self.response_tokens > 1:
                responses[0] = responses[0][:-1]
            images = () if start is None else start.images_of(group)
            sequences = [TokenSequence.from_prompt_and_response(prompt, response) for response in responses]
            groups.append(Group([TokenSequence(one.input_ids, one.scored, images) for one in sequences]))
        return collate(groups)

    def _token_ids(self) -> list[int]:
        """Token ids that fill prompts and responses, and that each response begins with."""
        if self.start is None:
            return [0, *range(self.num_responses)]
        return self.start.free_ids(1 + self.num_responses)


class Moment(NamedTuple):
    """The memory held right after an operator, including its arguments."""

    operator: str
    region: str | None
    total_bytes: int
    bytes_by_category: Mapping[str, int]


class _FakeTracker(MemoryTracker):
    """Of fake tensors, which no compiled layer touches: PyTorch's guard against compiling costs more than the rest."""

    def __init__(self, training: FakeTraining) -> None:
        super().__init__(training.model)
        self._mode = training.mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fake_results.run(self._mode, func, args, kwargs)


def resting(training: FakeTraining) -> Mapping[str, int]:
    """Bytes held between steps, by category: weights, gradients and optimizer state."""
    with training.mode, _FakeTracker(training) as tracker:
        tracker.assign(OPTIMIZER, *training.optimizer_state)
        return tracker.current.bytes_by_category


def trace_step(training: FakeTraining, batch: Batch, variant: EngineOptions, device_type: str) -> list[Moment]:
    """Run one forward and backward on fake tensors.

    Between two operators memory is only freed, so the peak is at one of the returned moments. The first one, before the
    step, is what stays from step to step.

    Args:
        training: The fake model.
        batch: The batch, on the CPU; its index tensors are real.
        variant: How to run it.
        device_type: The type of device that the fake tensors stand in for.
    """
    step = _prepare(training, batch, variant)
    moments: list[Moment] = []
    with training.mode, _FakeTracker(training) as tracker:
        tracker.assign(OPTIMIZER, *training.optimizer_state)

        def record(operator: str) -> None:
            now = tracker.current
            moments.append(Moment(operator, current_region(), now.total_bytes, now.bytes_by_category))

        record("start")
        with running_on(device_type, record), RealIntegers() if batch.images else nullcontext():
            step()
    return moments


def _prepare(training: FakeTraining, batch: Batch, variant: EngineOptions) -> Callable[[], object]:
    """The step, with its index tensors built now as real ones, because the engine reads some of them."""
    batch = batch_for(training.model, batch, "tokens")
    batch.image_inputs()
    if variant.schedule != "bounded":
        batch.plan(variant.mode)
        return partial(forward_backward, training.model, batch, _made_up_loss, variant)
    return partial(
        forward_backward_step,
        training.model,
        join_batches([batch], max_tokens_per_chunk=variant.chunk_tokens),
        _made_up_loss,
        variant,
        references=[None],
        backward=lambda loss, _: loss.backward(),
    )


def _made_up_loss(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    """Reads the log-prob of every response, as preference losses do."""
    return LossOutput(policy.sum().mean(), {})
