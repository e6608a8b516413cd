"""Which layer of a model makes its logits or rewards."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from kvpref.models.value_head import trained_copy


def is_reward_model(model: PreTrainedModel) -> bool:
    """Whether the model ends in a scalar head instead of an LM head."""
    return type(model).__name__.endswith("ForSequenceClassification")


def head_module(model: PreTrainedModel) -> Any:
    """The layer that makes the logits, or the reward; the trained copy where PEFT keeps one. None if it has no name."""
    return trained_copy(getattr(model, "score", None) if is_reward_model(model) else model.get_output_embeddings())
