"""The sizes of a model, for counting its FLOPs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.models.attention_shapes import attention_shapes
from kvpref.models.backbone import text_backbone
from kvpref.models.output_layer import head_module, is_reward_model
from kvpref.models.partitioned import full_shape, num_values
from kvpref.models.recurrent_shapes import recurrent_flops
from kvpref.models.support import unwrap
from kvpref.plan.flops import ModelShape


def model_shape(model: nn.Module) -> ModelShape:
    """The sizes of a supported model, possibly wrapped. Adapters count as linear layers, except one on the LM head."""
    plain = unwrap(model)
    backbone, head = text_backbone(plain), getattr(head_module(plain), "weight", None)
    outside = {id(head), id(plain.get_input_embeddings().weight)}
    vocab_size, hidden_size = _head_sizes(plain) if head is None else full_shape(head)
    per_token = getattr(plain.config.get_text_config(decoder=True), "num_experts_per_tok", None)
    # By identity: weights that layers share are stored once and counted once.
    weights = {id(weight): count for module in backbone.modules() for weight, count in _used_weights(module, per_token)}
    return ModelShape(
        linear_weights=sum(count for key, count in weights.items() if key not in outside),
        attention=attention_shapes(plain),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        recurrent_flops=recurrent_flops(backbone),
    )


def _head_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """The sizes of a head without a weight of its own."""
    config = model.config.get_text_config(decoder=True)
    return 1 if is_reward_model(model) else config.vocab_size, config.hidden_size


def _used_weights(module: nn.Module, experts_per_token: int | None) -> Iterator[tuple[torch.Tensor, int]]:
    """The matrices of the module itself, each with the number of weights that a token is multiplied by."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and len(full_shape(weight)) == 2 and not isinstance(module, nn.Embedding):
        yield weight, num_values(weight)
    num_experts = getattr(module, "num_experts", None)
    for stacked in module.parameters(recurse=False):
        shape = full_shape(stacked)
        if isinstance(num_experts, int) and len(shape) == 3 and shape[0] == num_experts:
            yield stacked, num_values(stacked) // num_experts * min(experts_per_token or num_experts, num_experts)
