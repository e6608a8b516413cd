"""`Wrapper`: how passes run in an unwrapped model, and what other wrappers override."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from kvpref.models.attach import Program, run_inside

R = TypeVar("R")


class Wrapper:
    """A model whose forward and backward passes involve no other rank.

    Args:
        model: An attached model.

    Attributes:
        model: As given.
        is_lockstep: Whether each pass of the bounded schedule is a collective, so that ranks must run equally many.
        adds_in_place: Whether a chunk may add to `.grad` directly, bypassing autograd.
    """

    is_lockstep = False
    adds_in_place = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run_whole(self, program: Program[R], *, several_passes: bool) -> R:
        """Run all passes of a micro-batch; the backward pass averages gradients, wherever it is called.

        Args:
            program: Runs inside the model's forward.
            several_passes: Whether it may run layers more than once, and not equally often on all ranks.
        """
        return run_inside(self.model, program)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Wraps `run_whole` and the backward pass of its result."""
        yield

    def run_chunk(self, program: Program[R]) -> R:
        """Run one pass of the bounded schedule, inside `step`."""
        return run_inside(self.model, program)

    @contextmanager
    def step(self, *, trains: bool) -> Iterator[None]:
        """Wraps all chunks of a step, forward and backward; gradients are averaged at its end.

        Args:
            trains: Whether there are backward passes.
        """
        yield

    def discard(self) -> None:
        """Drop all gradients, and whatever a failed step left."""
        self.model.zero_grad(set_to_none=True)
