"""Freezing parts of a model."""

from __future__ import annotations

from torch import nn

from kvpref.errors import InputError
from kvpref.models.support import unwrap
from kvpref.models.vision.parts import vision_parts


def freeze_vision(model: nn.Module) -> None:
    """Freeze the vision tower and its projector, including adapters on them.

    Raises:
        InputError: If the model has no vision tower.
    """
    inner = unwrap(model)
    weights = vision_parts(inner).weights
    if not weights:
        raise InputError(f"freeze_vision: {type(inner).__name__} has no vision tower; leave it out")
    for weight in weights.values():
        weight.requires_grad_(False)
