"""Which layers LoRA adapts."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from kvpref.errors import InputError
from kvpref.models.backbone import text_backbone
from kvpref.models.support import unwrap
from kvpref.models.vision.parts import text_prefix, vision_parts

ALL_LINEAR = "all-linear"
"""PEFT's name for every linear layer except the output."""


def find_targets(model: nn.Module, names: str) -> str | list[str]:
    """PEFT's target modules for LoRA weights.

    Args:
        model: A model without an adapter.
        names: `ALL_LINEAR` (in a model that sees images, those of its language model), or module names separated by
            commas, wherever they occur.

    Raises:
        InputError: If the model has no such module.
    """
    targets = [name.strip() for name in names.split(",") if name.strip()]
    if targets in ([], [ALL_LINEAR]):
        return _linear_of_language_model(unwrap(model))
    modules = dict(model.named_modules())
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            linear = {name.rpartition(".")[2] for name, item in modules.items() if _is_linear(item)}
            raise InputError(
                f"lora_target_modules: the model has no module {target!r}; its linear layers: "
                f"{', '.join(sorted(linear))}"
            )
    return targets


def _linear_of_language_model(model: PreTrainedModel) -> str:
    if not vision_parts(model).weights:
        return ALL_LINEAR
    linear = {name.rpartition(".")[2] for name, item in text_backbone(model).named_modules() if _is_linear(item)}
    return rf"{re.escape(text_prefix(model))}\..*\.({'|'.join(sorted(linear))})"


def _is_linear(module: nn.Module) -> bool:
    # Conv1D is GPT-2's own kind of linear layer.
    return type(module).__name__ in ("Linear", "Conv1D")
