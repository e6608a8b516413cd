"""A backward pass that adds nothing, but triggers a wrapper's hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kvpref.models.attach import run_inside


def touch(model: nn.Module, parameters_of: Callable[[nn.Module], Sequence[torch.Tensor]]) -> None:
    """Run forward and backward of a zero that depends on some parameters.

    Args:
        model: An attached and wrapped model.
        parameters_of: Gives parameters of the inner model while its forward runs; at least one of them trained.
    """
    with torch.enable_grad():
        run_inside(model, lambda inner: _Touch.apply(*parameters_of(inner))).backward()


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # A single zero, expanded to each parameter's shape.
        return tuple(grad.new_zeros(()).to(p.dtype).expand_as(p) for p in ctx.saved_tensors)
