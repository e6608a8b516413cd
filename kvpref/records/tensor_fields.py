"""Dataclasses of tensors, moved to a device or pinned as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from kvpref.records.host_copies import to_device

T = TypeVar("T")

STAYS_ON_THE_HOST: Mapping[str, str] = {"place": "host"}
"""Metadata of a field whose tensor stays in host memory, wherever the others go."""


def tensors_to(plan: T, device: torch.device | str) -> T:
    """A copy of a plan dataclass (or tensor, or tuple) with every tensor on `device`; the host does not wait for it."""
    target = torch.device(device)
    return map_tensors(plan, lambda tensor: to_device(tensor, target))


def map_tensors(plan: T, function: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """A copy of a plan dataclass (or tensor, or tuple) with ``function(tensor)`` in place of every tensor.

    Fields marked `STAYS_ON_THE_HOST` are left as they are.
    """
    if isinstance(plan, torch.Tensor | tuple):
        return _map(plan, function)  # type: ignore[no-any-return]
    if not is_dataclass(plan) or isinstance(plan, type):
        raise TypeError(f"expected a dataclass instance, a tensor or a tuple of them; got {type(plan).__name__}")
    moving = [field.name for field in fields(plan) if field.metadata != STAYS_ON_THE_HOST]
    return replace(plan, **{name: _map(getattr(plan, name), function) for name in moving})


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [_map(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)  # a named tuple stays one
    return map_tensors(value, function) if is_dataclass(value) else value
