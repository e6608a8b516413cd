"""The sizes of a model, for counting its FLOPs."""

from __future__ import annotations

from torch import nn

from kvpref.flops import ModelShape
from kvpref.modeling.head import output_head
from kvpref.modeling.support import unwrap


def model_shape(model: nn.Module) -> ModelShape:
    """The sizes of a supported model, possibly wrapped. Adapters count as linear layers.

    Raises:
        UnsupportedModelError: If its LM head is not a linear layer.
    """
    plain = unwrap(model)
    config, head = plain.config, output_head(plain)
    outside = {id(head.weight), id(plain.get_input_embeddings().weight)}
    num_heads = config.num_attention_heads
    return ModelShape(
        linear_weights=sum(
            module.weight.numel()
            for module in plain.modules()
            if getattr(module, "weight", None) is not None
            and module.weight.ndim == 2
            and id(module.weight) not in outside
            and not isinstance(module, nn.Embedding)
        ),
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        hidden_size=head.in_features,
        vocab_size=head.out_features,
    )
