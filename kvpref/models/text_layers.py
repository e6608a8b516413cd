"""Running the text layers of a model on the embeddings of a pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from kvpref.models.backbone import text_backbone
from kvpref.models.experts import RouterTally
from kvpref.models.families import FAMILIES
from kvpref.models.positions import first_position, positions_told
from kvpref.models.running_pass import HeadExchange
from kvpref.models.vision.merging import PassImages
from kvpref.plan.passes import PassPlan


class PassExtras(NamedTuple):
    """What a pass takes and returns besides tokens.

    Attributes:
        routers: Collects the router logits of expert layers; None ignores them.
        images: The images of its batch or step; None if there are none.
        exchange: As in `RunningPass`.
    """

    routers: RouterTally | None = None
    images: PassImages | None = None
    exchange: HeadExchange | None = None


def run_backbone(
    model: PreTrainedModel,
    item: PassPlan,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    extras: PassExtras | None = None,
) -> torch.Tensor:
    """The final hidden states of a pass, (B, T, hidden_size).

    Args:
        model: The model whose layers run.
        item: The pass.
        embeds: (B, T, hidden_size), its input embeddings.
        attention_mask: (B, T), 1 for tokens; None if all are.
        extras: Experts' routers and images.
    """
    routers, images, _ = extras or PassExtras()
    layers, first = text_backbone(model), first_position(model)
    embeds = _scaled(model, embeds)
    inputs: dict[str, Any] = {"position_ids": item.position_ids + first if first else item.position_ids}
    inputs.update(_embeddings_per_layer(layers, item.input_ids, embeds))
    if images is not None:
        embeds = images.merge(item, embeds)
        inputs.update(images.layer_inputs(item))
    if routers is not None:
        inputs["output_router_logits"] = True
    with positions_told(layers, item.position_ids):
        output = layers(
            inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False, return_dict=True, **inputs
        )
    if routers is not None:
        routers.add(output)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _scaled(model: PreTrainedModel, embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings scaled as by the model when it looks them up itself."""
    config = model.config.get_text_config(decoder=True)
    family = FAMILIES.get(config.model_type)
    factor = getattr(config, family.embedding_factor, 1.0) if family is not None and family.embedding_factor else 1.0
    return embeds if factor == 1.0 else embeds * factor


def _embeddings_per_layer(layers: Any, input_ids: torch.Tensor, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
    """The extra embeddings that layers look up for each token (Gemma 3n and 4)."""
    look_up = getattr(layers, "get_per_layer_inputs", None)
    if look_up is None or not getattr(layers.config, "hidden_size_per_layer_input", 0):
        return {}
    try:
        found: torch.Tensor = look_up(input_ids, embeds)
    except TypeError:  # Gemma 3n takes only the tokens
        found = look_up(input_ids)
    return {"per_layer_inputs": found}
