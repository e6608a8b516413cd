"""Which weights of a model belong to its vision tower and to its projector, and which to its language model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from kvpref.models.backbone import text_backbone
from kvpref.models.classes import sees_images
from kvpref.models.output_layer import head_module
from kvpref.models.value_head import VALUE_HEAD

_PROJECTOR = re.compile(
    r"(^|\.)(\w*projector|\w*merger\w*|connector|embed_vision|embed_audio|aligner|image_newline)(\.|$)"
)
"""Names of the layers that map a tower's output to the size of embeddings."""


@dataclass(frozen=True, kw_only=True)
class VisionParts:
    """Weights by their names in the model."""

    tower: dict[str, nn.Parameter]
    """Everything that runs before the projector, including towers for inputs other than images."""

    projector: dict[str, nn.Parameter]
    """The weights between tower and language model."""

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights of tower and projector."""
        return self.tower | self.projector


def vision_parts(model: PreTrainedModel) -> VisionParts:
    """The weights outside the language model and its heads; empty for a text model.

    Args:
        model: An unwrapped model; adapter weights count towards the part that holds them.
    """
    if not sees_images(model.config):
        return VisionParts(tower={}, projector={})
    heads = (head_module(model), getattr(model, VALUE_HEAD, None))
    language = {
        id(weight)
        for module in (text_backbone(model), model.get_input_embeddings(), *heads)
        if module is not None
        for weight in module.parameters()
    }
    outside = {name: weight for name, weight in model.named_parameters() if id(weight) not in language}
    projector = {name: weight for name, weight in outside.items() if _PROJECTOR.search(name)}
    return VisionParts(
        tower={name: weight for name, weight in outside.items() if name not in projector}, projector=projector
    )


def text_prefix(model: PreTrainedModel) -> str:
    """The name of the language model's layers in a model, such as ``model.language_model``."""
    layers = text_backbone(model)
    return next(name for name, module in model.named_modules() if module is layers)
