"""The sizes of a model, for counting its FLOPs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.models.attention_shapes import attention_shapes
from kvpref.models.backbone import text_backbone
from kvpref.models.output_layer import head_module, is_reward_model
from kvpref.models.recurrent_shapes import recurrent_flops
from kvpref.models.support import unwrap
from kvpref.plan.flops import ModelShape


def model_shape(model: nn.Module) -> ModelShape:
    """The sizes of a supported model, possibly wrapped. Adapters count as linear layers, but for one on the LM head."""
    plain = unwrap(model)
    backbone, head = text_backbone(plain), getattr(head_module(plain), "weight", None)
    outside = {id(head), id(plain.get_input_embeddings().weight)}
    vocab_size, hidden_size = _head_sizes(plain) if head is None else head.shape
    per_token = getattr(plain.config.get_text_config(decoder=True), "num_experts_per_tok", None)
    # By identity: layers may share their weights. Such a weight is counted once, as it is held.
    weights = {id(weight): count for module in backbone.modules() for weight, count in _used_weights(module, per_token)}
    return ModelShape(
        linear_weights=sum(count for key, count in weights.items() if key not in outside),
        attention=attention_shapes(plain),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        recurrent_flops=recurrent_flops(backbone),
    )


def _head_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Of a head that has no weight of its own."""
    config = model.config.get_text_config(decoder=True)
    return 1 if is_reward_model(model) else config.vocab_size, config.hidden_size


def _used_weights(module: nn.Module, experts_per_token: int | None) -> Iterator[tuple[torch.Tensor, int]]:
    """The matrices of a module itself, and how many of their weights every token is multiplied by."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
        yield weight, weight.numel()
    num_experts = getattr(module, "num_experts", None)
    for stacked in module.parameters(recurse=False):
        if isinstance(num_experts, int) and stacked.ndim == 3 and stacked.shape[0] == num_experts:
            yield stacked, stacked.numel() // num_experts * min(experts_per_token or num_experts, num_experts)
