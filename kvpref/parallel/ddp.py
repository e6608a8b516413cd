"""DistributedDataParallel with gradients that accumulate outside its own forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kvpref.errors import UnsupportedModelError
from kvpref.models.attach import Program, run_inside
from kvpref.parallel.plain import Wrapper
from kvpref.parallel.recovery import before_collective
from kvpref.parallel.touch import touch

R = TypeVar("R")


class DdpWrapper(Wrapper):
    """DistributedDataParallel, whose forward runs one program, and which averages in one backward pass."""

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__(model)
        self._ddp = model

    def run_chunk(self, program: Program[R]) -> R:
        return run_inside(self._ddp.module, program)

    @contextmanager
    def step(self, *, trains: bool) -> Iterator[None]:
        if trains and self._ddp.static_graph:
            raise UnsupportedModelError(
                "DistributedDataParallel(static_graph=True) averages gradients before all chunks have added theirs; "
                "leave static_graph out, or use schedule 'full'"
            )
        yield
        if trains and self._ddp.require_backward_grad_sync:
            before_collective(is_last=True)
            touch(self._ddp, _trainable)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
