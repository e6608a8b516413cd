"""The stack of decoder layers in a Hugging Face model, and how it is run on embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.models.experts import RouterTally
from kvpref.models.families import FAMILIES
from kvpref.models.positions import first_position, positions_told
from kvpref.plan.passes import PassPlan

_CALLS_PER_LAYER = 4
"""More than any layer makes attention calls."""


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """What a model's own forward calls to get the hidden states that its head reads."""
    base: Any = model.base_model
    if base is model:  # Llama 4's text model names its prefix otherwise than its backbone
        base = getattr(model, "language_model", model).model
    decoder = getattr(base, "decoder", None)  # OPT's head calls a part of the backbone
    found: PreTrainedModel = decoder if isinstance(decoder, PreTrainedModel) else base
    return found


def text_backbone(model: PreTrainedModel) -> nn.Module:
    """The module that turns embeddings of text into final hidden states.

    A model of several kinds of input keeps it beside its other towers, whose code asks for more than text.
    """
    whole = backbone(model)
    found: nn.Module = getattr(whole, "language_model", whole)
    return found


def max_attention_calls(model: PreTrainedModel) -> int:
    """An upper bound on the attention calls of one forward pass."""
    num_layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
    return _CALLS_PER_LAYER * num_layers


def run_backbone(
    model: PreTrainedModel,
    item: PassPlan,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    routers: RouterTally | None = None,
) -> torch.Tensor:
    """The final hidden states of a pass, (B, T, hidden_size).

    Args:
        model: Whose layers run.
        item: The pass.
        embeds: (B, T, hidden_size), its input embeddings.
        attention_mask: (B, T), 1 for tokens; None for all.
        routers: Takes in the router logits of expert layers; None leaves them.
    """
    layers, first = text_backbone(model), first_position(model)
    with positions_told(layers, item.position_ids):
        output = layers(
            inputs_embeds=_scaled(model, embeds),
            position_ids=item.position_ids + first if first else item.position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
            **_embeddings_per_layer(layers, item.input_ids, embeds),
            **({} if routers is None else {"output_router_logits": True}),
        )
    if routers is not None:
        routers.add(output)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _scaled(model: PreTrainedModel, embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings as the model's layers get them when it looks them up itself."""
    config = model.config.get_text_config(decoder=True)
    family = FAMILIES.get(config.model_type)
    factor = getattr(config, family.embedding_factor, 1.0) if family is not None and family.embedding_factor else 1.0
    return embeds if factor == 1.0 else embeds * factor


def _embeddings_per_layer(layers: Any, input_ids: torch.Tensor, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
    """What layers look up of each token besides its embedding (Gemma 3n and 4)."""
    look_up = getattr(layers, "get_per_layer_inputs", None)
    if look_up is None or not getattr(layers.config, "hidden_size_per_layer_input", 0):
        return {}
    try:
        found: torch.Tensor = look_up(input_ids, embeds)
    except TypeError:  # Gemma 3n asks for the tokens alone
        found = look_up(input_ids)
    return {"per_layer_inputs": found}
