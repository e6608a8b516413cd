"""FSDP2: weights gathered once for all passes of a micro-batch, gradients reduced once, no collective between.

FSDP2 hooks into a layer's inputs and outputs: weights are gathered again when the gradient of an output arrives, and
gradients are reduced when that of an input is done. Keys and values leave a layer by another way, and a layer runs
once per pass; so while passes of one graph are open, FSDP2 does neither.

Vision towers run only on ranks with images. So all ranks first gather the towers, and give them gradients of zero if
no image ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from kvpref.models.attach import Program, run_inside
from kvpref.parallel.fsdp2_shards import shards_of
from kvpref.parallel.plain import Wrapper
from kvpref.parallel.recovery import before_collective
from kvpref.parallel.sharding import Sharding
from kvpref.parallel.touch import touch

R = TypeVar("R")


class Fsdp2Wrapper(Wrapper):
    """A model to which `fully_shard` was applied, or to what wraps it.

    Args:
        model: An attached model.
        sharding: How the bounded schedule treats it.
    """

    adds_in_place = False  # a reduced gradient is the beginning of another tensor

    def __init__(self, model: nn.Module, sharding: Sharding) -> None:
        super().__init__(model)
        self._sharding, self._shards = sharding, shards_of(model)
        self.is_lockstep = "chunk" in (sharding.gather_weights, sharding.reduce_grads)

    def run_whole(self, program: Program[R], *, several_passes: bool) -> R:
        shards = self._shards
        if not (several_passes or shards.sees_images):
            return run_inside(self.model, program)  # each layer runs once, as FSDP2 expects
        begun = shards.begin(keeps_weights=True, keeps_grads=True)
        try:
            made = run_inside(self.model, shards.after_towers(program))
        except BaseException:
            shards.end()
            raise
        if torch.is_grad_enabled():
            return shards.reduced_by_backward(made)
        if begun:
            shards.end()
        return made

    def run_chunk(self, program: Program[R]) -> R:
        return run_inside(self.model, self._shards.after_towers(program))

    @contextmanager
    def step(self, *, trains: bool) -> Iterator[None]:
        shards, sharding = self._shards, self._sharding
        keeps_weights, keeps_grads = sharding.gather_weights == "step", sharding.reduce_grads == "step"
        shards.end()  # passes without a backward pass
        shards.begin(keeps_weights=keeps_weights, keeps_grads=keeps_grads)
        try:
            if shards.sees_images or keeps_weights:
                before_collective()
                gather = shards.gather_all if keeps_weights else _nothing
                with torch.no_grad():  # from here on towers and layers run without a collective
                    self.run_chunk(gather)
            yield
            shards.restore()
            if trains and shards.groups.reduce and (keeps_grads or shards.sees_images):
                before_collective(is_last=True)
                touch(self.model, shards.to_touch)
        finally:
            shards.end()

    def discard(self) -> None:
        self._shards.forget()
        super().discard()


def _nothing(model: nn.Module) -> None:
    """A program that only causes the root and the towers to be gathered."""
