"""Loads and attaches a second model as the reference."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from kvpref.errors import InputError
from kvpref.models.attach import attach
from kvpref.models.classes import model_class
from kvpref.models.compilation import compile_layers, is_compiled
from kvpref.models.output_layer import is_reward_model
from kvpref.models.support import is_padded_only, unwrap


def load_reference_model(given: nn.Module | str, policy: nn.Module, device: torch.device) -> nn.Module:
    """The reference model on its device, attached and in eval mode; compiled if the policy is.

    Args:
        given: The model, or its folder or hub name, loaded in the policy's dtype.
        policy: The trained model.
        device: The reference's device.

    Raises:
        InputError: If it cannot be loaded, has no language-model head, or shares weights with the policy.
        UnsupportedModelError: If it would not be computed exactly.
    """
    model = _load(given, unwrap(policy).dtype) if isinstance(given, str) else given
    own = {id(item) for item in policy.parameters()}
    if any(id(item) in own for item in model.parameters()):
        raise InputError(
            "reference_model shares weights with the model that is trained, and would change with it; leave it out to "
            "keep the reference as the model is now, or pass a copy (copy.deepcopy)"
        )
    if is_reward_model(unwrap(model)):
        raise InputError(f"reference_model: {type(unwrap(model)).__name__} has no language-model head")
    attach(model, padded_only=is_padded_only(unwrap(policy).config))
    if is_compiled(policy):
        compile_layers(model)
    return model.to(device).eval()


def _load(name: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model: PreTrainedModel = model_class(AutoConfig.from_pretrained(name)).from_pretrained(name, dtype=dtype)
        return model
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"reference_model {name}: cannot load it: {reason}; give a folder with config.json and weights, or a hub "
            "name"
        ) from error
