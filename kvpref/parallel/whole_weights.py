"""Whole weights from sharded ones."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def whole(weight: torch.Tensor) -> torch.Tensor:
    """The whole weight, detached. If it is sharded, every rank has to ask for it, in the same order."""
    found: torch.Tensor = weight.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found
