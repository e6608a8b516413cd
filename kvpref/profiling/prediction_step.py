"""A training step on fake tensors: the engine's own code, and the bytes held after every operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvpref.batch import Batch, ResponseLogps, collate
from kvpref.errors import InputError
from kvpref.groups import Group
from kvpref.groups import Sequence as TokenSequence
from kvpref.losses import LossOutput
from kvpref.modeling.schedules import forward_backward
from kvpref.profiling.memory_tracker import MemoryTracker
from kvpref.profiling.prediction_kernels import running_on
from kvpref.profiling.prediction_model import FakeTraining
from kvpref.regions import current_region


@dataclass(frozen=True, kw_only=True)
class GroupShape:
    """The lengths of made-up groups: one prompt with so many responses each.

    Raises:
        InputError: If a length is not positive.
    """

    prompt_tokens: int
    response_tokens: int
    num_responses: int

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "response_tokens", "num_responses"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")

    @property
    def unique_tokens(self) -> int:
        """Of one group."""
        return self.prompt_tokens + self.num_responses * self.response_tokens

    @property
    def total_tokens(self) -> int:
        """Of one group, with the prompt counted once per response."""
        return self.num_responses * (self.prompt_tokens + self.response_tokens)

    def batch(self, num_groups: int, *, ragged: bool = False) -> Batch:
        """Collated groups that share nothing with one another.

        Args:
            num_groups: How many.
            ragged: Make one response a token shorter, so that a padded batch has padding.
        """
        groups = []
        for group in range(num_groups):
            prompt = [group, *[0] * (self.prompt_tokens - 1)]
            responses = [[index, *[0] * (self.response_tokens - 1)] for index in range(self.num_responses)]
            if ragged and group == 0 and self.response_tokens > 1:
                responses[0] = responses[0][:-1]
            groups.append(Group([TokenSequence.from_prompt_and_response(prompt, response) for response in responses]))
        return collate(groups)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to run a micro-batch; the fields are those of `kvpref.forward_backward`."""

    mode: str = "two_pass"
    schedule: str = "full"
    max_tokens_per_chunk: int | None = None
    prefix_cache: str = "device"
    checkpoint: str = "none"


class Moment(NamedTuple):
    """What was held right after an operator, its arguments included."""

    operator: str
    region: str | None
    total_bytes: int
    bytes_by_category: Mapping[str, int]


def trace_step(training: FakeTraining, batch: Batch, variant: Variant, device_type: str) -> list[Moment]:
    """Run one forward and backward on fake tensors.

    Between two operators memory is only freed, so the most that is held is held at one of the moments returned. The
    first one is before the step: what stays from step to step.

    Args:
        training: The fake model.
        batch: On the CPU; its index tensors are real.
        variant: How to run it.
        device_type: What the fake tensors stand in for.
    """
    batch.plan(variant.mode)
    with training.mode, MemoryTracker(training.model) as tracker:
        tracker.assign("optimizer", *training.optimizer_state)
        with _Recorder(tracker) as recorder, running_on(device_type):
            _run(training, batch, variant)
        return recorder.moments


def _run(training: FakeTraining, batch: Batch, variant: Variant) -> None:
    forward_backward(
        training.model,
        batch,
        _made_up_loss,
        mode=variant.mode,
        schedule=variant.schedule,
        max_tokens_per_chunk=variant.max_tokens_per_chunk,
        prefix_cache=variant.prefix_cache,
        checkpoint=variant.checkpoint,
    )


def _made_up_loss(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    """Reads the log-prob of every response, as preference losses do."""
    return LossOutput(policy.sum().mean(), {})


class _Recorder(TorchDispatchMode):
    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__()
        self._tracker = tracker
        self.moments: list[Moment] = []
        self._record("start")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._record(str(func))
        return result

    def _record(self, operator: str) -> None:
        now = self._tracker.current
        self.moments.append(Moment(operator, current_region(), now.total_bytes, now.bytes_by_category))
