"""Gradients that were added up outside the distributed wrapper's own forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kvpref.errors import UnsupportedModelError
from kvpref.models.attach import run_inside
from kvpref.parallel.sharding import is_sharded


def local_module(model: nn.Module) -> nn.Module:
    """The module whose forward and backward add to local gradients only.

    Raises:
        UnsupportedModelError: If the parameters are sharded, whose ranks would have to run equally many chunks, or the
            wrapper relies on a static graph.
    """
    if is_sharded(model):
        raise UnsupportedModelError(
            "schedule 'bounded' (and prefix_grad=False) runs as many forward passes as a rank's data needs, and a "
            "sharded model (FSDP, DeepSpeed) needs the same number on every rank; use schedule 'full' with a smaller "
            "max_tokens_per_micro_batch, or DistributedDataParallel"
        )
    if not isinstance(model, DistributedDataParallel):
        return model
    if model.static_graph:
        raise UnsupportedModelError(
            "DistributedDataParallel(static_graph=True) averages gradients before all chunks have added theirs; leave "
            "static_graph out, or use schedule 'full'"
        )
    return model.module


def synchronise_gradients(model: nn.Module) -> None:
    """Average the gradients over the ranks of DistributedDataParallel, unless inside its `no_sync`."""
    if isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
        with torch.enable_grad():
            run_inside(model, lambda inner: _Touch.apply(*_trainable(inner))).backward()


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class _Touch(torch.autograd.Function):
    """A zero that depends on every parameter: its backward pass adds nothing, and lets DDP reduce what is there."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # One zero, seen as a tensor of each parameter's shape.
        return tuple(grad.new_zeros(()).to(p.dtype).expand_as(p) for p in ctx.saved_tensors)
