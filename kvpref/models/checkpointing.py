"""Activation checkpointing of single passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kvpref.errors import UnsupportedModelError

CHECKPOINTS = ("none", "prefix", "all")
"""Which passes keep only the inputs of their layers and recompute the rest: none, those that others read, or all."""

_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func")


def checkpoints_pass(choice: str, *, is_prefix: bool) -> bool:
    """Whether a pass is checkpointed; `is_prefix` says whether others read its keys and values."""
    return choice == "all" or (choice == "prefix" and is_prefix)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether any of a model's layers is set to be recomputed."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules())


@contextmanager
def checkpointed(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Checkpoint every decoder layer that runs inside, without re-entering autograd; in training mode only.

    Raises:
        UnsupportedModelError: If the model's layers cannot be checkpointed.
    """
    if not enabled:
        yield
        return
    layers = list(_outermost(model))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layers that can be checkpointed; use checkpoint none"
        )
    before = [{name: vars(layer)[name] for name in _ATTRIBUTES if name in vars(layer)} for layer in layers]
    # Re-entrant checkpointing loses the gradient through keys and values. Dropout is refused, so nothing is random.
    values = (True, partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    for layer in layers:
        vars(layer).update(zip(_ATTRIBUTES, values, strict=True))
    try:
        yield
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            for name in _ATTRIBUTES:
                del vars(layer)[name]
            vars(layer).update(attributes)


def _outermost(module: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """Layers that are inside no other such layer; a nested one would not find its settings when recomputed."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost(child)
