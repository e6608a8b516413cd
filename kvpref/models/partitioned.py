"""Weights that DeepSpeed ZeRO-3 has split over the ranks: a parameter then looks empty, whatever its size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def is_partitioned(weight: torch.Tensor) -> bool:
    """Whether a weight is managed by ZeRO-3, gathered or not."""
    return hasattr(weight, "ds_id")


def has_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 manages any weight of a model."""
    return any(map(is_partitioned, model.parameters()))


def full_shape(weight: torch.Tensor) -> torch.Size:
    """The shape of the whole weight."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def num_values(weight: torch.Tensor) -> int:
    """The number of elements of the whole weight."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def gathered(weights: Iterable[torch.Tensor], *, changes: bool = False) -> contextlib.AbstractContextManager[Any]:
    """While open, weights are whole on every rank. A collective: all ranks must call it with the same weights.

    Args:
        weights: Weights of one model; those not managed by ZeRO-3 stay as they are.
        changes: Whether rank 0 changes them inside; all ranks then take its values.
    """
    cut = [weight for weight in weights if is_partitioned(weight)]
    if not cut:
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(cut, modifier_rank=0 if changes else None)
