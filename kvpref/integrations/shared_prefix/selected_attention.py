"""Run a model with kvpref's attention temporarily, including checkpointed layers that the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvpref.errors import UnsupportedModelError
from kvpref.models.attention import attention_name, register
from kvpref.models.recomputation import FUNCTION, checkpoint_contexts


@contextmanager
def selected_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's layers find kvpref's attention while open; their own is restored afterwards.

    Layers that a checkpoint recomputes later, outside, find it again.

    Raises:
        UnsupportedModelError: If a layer's checkpointing does not allow it.
    """
    register()
    with checkpoint_contexts(checkpointed_layers(model), lambda _: partial(_contexts, model)), _named(model):
        yield


def checkpointed_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Modules whose layers are recomputed in the backward pass.

    Raises:
        UnsupportedModelError: If checkpointing is re-entrant, or has its own contexts.
    """
    layers = [
        module
        for module in model.modules()
        if module.training and getattr(module, "gradient_checkpointing", False) and hasattr(module, FUNCTION)
    ]
    for layer in layers:
        options = getattr(getattr(layer, FUNCTION), "keywords", {})
        if options.get("use_reentrant", True) or "context_fn" in options:
            raise UnsupportedModelError(
                "gradient checkpointing that is re-entrant, or has a context_fn of its own, cannot share prefixes; "
                "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
    return layers


@contextmanager
def _named(model: PreTrainedModel) -> Iterator[None]:
    """Set the attention's name in every config that a layer reads."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None:
            configs[id(config)] = config
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = attention_name(model)
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _contexts(model: PreTrainedModel) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts for a checkpointed layer's first run and for its recomputation."""
    return nullcontext(), _named(model)
