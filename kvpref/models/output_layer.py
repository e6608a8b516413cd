"""Which layer of a model makes its logits or rewards."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvpref.models.value_head import trained_copy


def is_reward_model(model: PreTrainedModel) -> bool:
    """Whether the model ends in a scalar head instead of an LM head."""
    return type(model).__name__.endswith("ForSequenceClassification")


def head_module(model: PreTrainedModel) -> Any:
    """The layer that makes the logits or the reward, or PEFT's trained copy of it. None if it has no known name."""
    return trained_copy(getattr(model, "score", None) if is_reward_model(model) else model.get_output_embeddings())


def head_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights that a model reads after its backbone: the head's, tied or not, and those of layers beside it."""
    head = head_module(model)
    backbone = {id(weight) for weight in model.base_model.parameters()}
    own = [] if head is None else list(head.parameters())
    return [*own, *(weight for weight in model.parameters() if id(weight) not in backbone)]
