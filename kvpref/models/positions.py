"""How models learn the positions of a pass's tokens.

Most take `position_ids` that begin at 0. Descendants of RoBERTa begin after the padding's position. Decoders of
encoder-decoder models count along the row unless their position embedding is given the positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.errors import UnsupportedModelError
from kvpref.records.groups import Group

_NORMS_AFTER_ROTATION = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text"})
"""Model types whose weights distinguish rotated dimensions, so that shifting all positions changes the computation."""


def reads_distances_only(config: Any) -> bool:
    """Whether shifting all positions of a sequence equally leaves its hidden states unchanged."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if rope is None or text.model_type in _NORMS_AFTER_ROTATION:
        return False
    return rope.get("llama_4_scaling_beta") is None  # Ministral 3 and Mistral 4 scale queries by positions


def first_position(model: PreTrainedModel) -> int:
    """The position of a sequence's first token."""
    padding = _padding_position(model)
    return 0 if padding is None else padding + 1


@contextmanager
def positions_told(backbone: nn.Module, position_ids: torch.Tensor) -> Iterator[None]:
    """Give the positions to the position embedding of decoders that would not pass them on.

    Args:
        backbone: The module called inside.
        position_ids: (B, T); B is 1 if a row holds several sequences.
    """
    decoder: Any = getattr(backbone, "decoder", backbone)
    embedding: Any = getattr(decoder, "embed_positions", None)
    if embedding is None or "position_ids" in inspect.signature(decoder.forward).parameters or len(position_ids) > 1:
        yield
        return

    def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "position_ids": position_ids[0]}

    handle = embedding.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_tokens(model: PreTrainedModel, groups: Iterable[Group]) -> None:
    """Check that every token has the position of its place in the sequence.

    Raises:
        UnsupportedModelError: If a model would give some token, and those after it, another position.
    """
    padding = _padding_position(model)
    if padding is None:
        return
    for number, group in enumerate(groups):
        for place, sequence in enumerate(group.parts):
            if (sequence.ids == padding).any():
                raise UnsupportedModelError(
                    f"sequence {place} of group {number} holds token {padding}, which {type(model).__name__} takes for "
                    "padding and skips in its positions; leave that token out"
                )


def _padding_position(model: PreTrainedModel) -> int | None:
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    if not hasattr(embeddings, "create_position_ids_from_input_ids"):
        return None
    position: int = embeddings.padding_idx
    return position
