"""What a peer offers: whether it can run here, its numbers on the first batch, and training steps one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvpref.plan.flops import Flops
from peers.task import Batching, Task


class DisagreementError(Exception):
    """Raised if a peer does not compute what kvpref computes, so that its time means nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstBatch:
    """What a runner computes on the task's first batch, before any update."""

    logps: torch.Tensor
    """(2 * num_pairs,) float32 on the CPU: log-prob of each whole response, chosen and rejected of each pair."""

    loss: float
    """DPO loss of the batch against reference log-probs of 0. Against the true reference it is ln 2, whatever runs."""

    gradient: torch.Tensor | None
    """(num_parameters,) float32 on the CPU: gradient of that loss, `flat_gradient`; None without a backward."""


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one optimizer step computes."""

    num_tokens: int
    """Tokens that run through the layers, padding included."""

    num_head_rows: int
    """Hidden states that go through the LM head."""

    flops: Flops
    """Of forward and backward, without the optimizer."""


class Runner(ABC):
    """One way to train, ready to start from the task's initial weights. Good for one run.

    Attributes:
        precompute_seconds: Time of the reference log-probs of all batches; None until they are computed.
        optimizer_seconds: The optimizer's share of each step so far.
    """

    precompute_seconds: float | None = None
    optimizer_seconds: list[float]

    @abstractmethod
    def first_batch(self) -> FirstBatch:
        """Forward and backward of the first batch; leaves the weights as they are."""

    @abstractmethod
    def steps(self) -> Iterator[float]:
        """Train on the task's batches in order. Each `next` is one optimizer step and gives its loss."""

    @abstractmethod
    def work(self) -> list[StepWork]:
        """What each step computes, in closed form."""


class Peer(ABC):
    """Another implementation.

    Attributes:
        name: Unique, with the setting.
        setting: Name of the setting; None where there is only one.
        batching: How pairs are put into batches; kvpref gets the same batches.
        description: What runs, and what its FLOPs count.
    """

    name: str
    setting: str | None = None
    batching: Batching = "group_by_length"
    description: str

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None."""

    def untimed(self, task: Task) -> str | None:
        """Why it can be compared on the first batch only, or None."""
        return None

    @abstractmethod
    def runner(self, task: Task) -> Runner:
        """A fresh runner of the peer.

        Raises:
            DisagreementError: If its inputs are not the task's.
        """

    @abstractmethod
    def opponent(self, task: Task) -> Runner:
        """A fresh runner of kvpref of the same kind: a trainer for a trainer, a loop for a loop."""


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients of a model in one vector, (num_parameters,) float32 on the CPU; they are cleared."""
    parts = [p.grad.detach().float().flatten().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(parts)
