"""Parts of a model that are not trained."""

from __future__ import annotations

from torch import nn

from kvpref.errors import InputError
from kvpref.models.support import unwrap
from kvpref.models.vision.parts import vision_parts


def freeze_vision(model: nn.Module) -> None:
    """Train neither the vision tower nor its projector, adapters on them included.

    Raises:
        InputError: If the model has none.
    """
    inner = unwrap(model)
    weights = vision_parts(inner).weights
    if not weights:
        raise InputError(f"freeze_vision: {type(inner).__name__} has no vision tower; leave it out")
    for weight in weights.values():
        weight.requires_grad_(False)
