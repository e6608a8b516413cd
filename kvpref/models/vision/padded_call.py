"""Image arguments of a call on padded rows: which of them are understood, and whether they agree.

Shape legend: B rows of L columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from kvpref.errors import InputError
from kvpref.models.backbone import backbone
from kvpref.models.vision.splitting import SPLIT_FAMILIES, splitter_of

_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


def image_arguments(model: PreTrainedModel) -> tuple[str, ...]:
    """The image arguments that are understood: pixel inputs and token types; none for an unknown family."""
    if model.config.model_type not in SPLIT_FAMILIES:
        return ()
    return (*splitter_of(model.config).names, *_token_types(model))


def pixel_inputs(
    model: PreTrainedModel, arguments: Mapping[str, Any], input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The pixel inputs of a call; empty if there are no images in it.

    Args:
        model: The model to call.
        arguments: The given ones of `image_arguments`, by name; None means not given.
        input_ids: (B, L).
        attention_mask: (B, L), 1 for tokens; None where all are.

    Raises:
        InputError: If token types do not mark exactly the placeholders as images, or are missing.
    """
    types = _token_types(model)
    found = {name: value for name, value in arguments.items() if name not in types and value is not None}
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{name} must be one tensor; got {type(value).__name__}")
    if found and "pixel_values" not in found:
        raise InputError(f"{', '.join(found)} given without pixel_values")
    for name in types:
        _check_types(name, arguments.get(name), _placeholders(model, input_ids) if found else None, attention_mask)
    return found


def _token_types(model: PreTrainedModel) -> tuple[str, ...]:
    names = inspect.signature(type(backbone(model)).forward).parameters
    return tuple(name for name in _TOKEN_TYPES if name in names)


def _placeholders(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return input_ids == model.config.image_token_id  # type: ignore[no-any-return]


def _check_types(name: str, types: Any, images: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """Check the token types, 1 for a token of an image: they decide which tokens see which, and positions."""
    if types is None:
        if images is not None:
            raise InputError(f"images need {name}, which the model's processor makes")
        return
    expected = torch.zeros_like(types) if images is None else images.to(types)
    differs = types != expected
    if mask is not None:
        differs = differs & mask.bool()
    if bool(differs.any()):
        raise InputError(f"{name} must be 1 at the placeholders of images and 0 elsewhere")
