"""The sizes of a model, for counting its FLOPs."""

from __future__ import annotations

import torch
from torch import nn

from kvpref.models.head import output_head
from kvpref.models.support import unwrap
from kvpref.plan.flops import ModelShape


def model_shape(model: nn.Module) -> ModelShape:
    """The sizes of a supported model, possibly wrapped. Adapters count as linear layers.

    Raises:
        UnsupportedModelError: If its LM head is not a linear layer.
    """
    plain = unwrap(model)
    config, head = plain.config, output_head(plain)
    outside = {id(head.weight), id(plain.get_input_embeddings().weight)}
    weights = {id(weight): weight for module in plain.modules() if (weight := _linear_weight(module)) is not None}
    num_heads = config.num_attention_heads
    return ModelShape(
        linear_weights=sum(weight.numel() for key, weight in weights.items() if key not in outside),
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        hidden_size=head.weight.shape[1],
        vocab_size=head.weight.shape[0],
    )


def _linear_weight(module: nn.Module) -> torch.Tensor | None:
    """The matrix that a module multiplies every token by, if it does."""
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, torch.Tensor) and weight.ndim == 2
    return weight if is_matrix and not isinstance(module, nn.Embedding) else None
