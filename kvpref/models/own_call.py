"""Compute with a module's weights inside a call of it, when wrappers that shard them have gathered them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

R = TypeVar("R")


def call_with(module: nn.Module, function: Callable[[torch.Tensor], R], hidden: torch.Tensor) -> R:
    """Run `function` in place of a module's forward, inside the hooks around it.

    FSDP2 and ZeRO-3 gather the module's weights before its forward and again before its backward pass.

    Args:
        module: The module whose weights are read.
        function: Called with `hidden` as wrappers pass it on; returns tensors, or a dict of them.
        hidden: The input that the module itself would get.
    """
    if not _is_gathered_by_calls(module):
        return function(hidden)
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        found: R = module(hidden)
    finally:
        del module.forward
        if before is not None:
            module.forward = before
    return found


def _is_gathered_by_calls(module: nn.Module) -> bool:
    """Whether a wrapper gathers this module's weights around its calls."""
    return isinstance(module, FSDPModule) or any(
        hasattr(weight, "ds_id") for weight in module.parameters(recurse=False)
    )
