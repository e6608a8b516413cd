"""The stack of decoder layers in a Hugging Face model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

_CALLS_PER_LAYER = 4
"""More attention calls than any layer makes."""

_TEXT_PARTS = ("language_model", "text_model")
"""Where multimodal models keep the layers that run on text."""


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The module that a model's forward calls to get the hidden states for its head."""
    base: Any = model.base_model
    if base is model:  # Llama 4's text model has a prefix that is not the name of its backbone
        base = getattr(model, "language_model", model).model
    decoder = getattr(base, "decoder", None)  # OPT's head calls a part of the backbone
    found: PreTrainedModel = decoder if isinstance(decoder, PreTrainedModel) else base
    return found


def text_backbone(model: PreTrainedModel) -> nn.Module:
    """The module that turns embeddings of text into final hidden states.

    A multimodal model keeps it beside its other towers, whose code needs more than text.
    """
    whole = backbone(model)
    for name in _TEXT_PARTS:
        if hasattr(whole, name):
            found: nn.Module = getattr(whole, name)
            return found
    return whole


def max_attention_calls(model: PreTrainedModel) -> int:
    """An upper bound on the attention calls of one forward pass."""
    num_layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
    return _CALLS_PER_LAYER * num_layers
