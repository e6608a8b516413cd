"""`compile_layers`: torch.compile for the decoder layers of an attached model."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kvpref.errors import InputError, UnsupportedModelError
from kvpref.models.attach import is_attached
from kvpref.models.backbone import text_backbone
from kvpref.models.mixers.forwards import find_mixers
from kvpref.models.support import unwrap

M = TypeVar("M", bound=nn.Module)

_MAX_GRAPHS = 1024
"""Above torch's limit of 8, at which compilation would fail: there is one graph per number of attention blocks at each
depth that a pass reads, and trees of trajectories have many."""


def compile_layers(model: M, **options: Any) -> M:
    """Compile each decoder layer in place, once for all layers, batch shapes and micro-batches.

    A layer compiles to one graph per kind of pass (first pass, later passes; more in schedule ``bounded``, and where
    sequences branch off inside segments, one per number of blocks, a logarithm of the number of places), with cascade
    attention as one operator in it; the passes themselves stay ordinary Python, and so do layers that carry a
    state from token to token, and those of vision towers. Compile before wrapping in DDP or sharding with FSDP2.

    Args:
        model: Attached with `kvpref.attach`; PEFT adapters must be in place already.
        **options: For `torch.nn.Module.compile`, such as `backend` or `mode`.

    Returns:
        The same model.

    Raises:
        InputError: If the model was not attached, or an option would recompile for each batch shape.
        UnsupportedModelError: If no layer can be compiled.
    """
    inner = unwrap(model)
    if not is_attached(inner):
        raise InputError("this model is not attached; call kvpref.attach(model) first")
    if options.get("dynamic") is False:
        raise InputError("compile_layers needs dynamic shapes: the number of tokens differs from batch to batch")
    # A layer leaves its keys and values with the running pass. This setting keeps a checkpoint that recomputes the
    # layer from leaving them again. Releases without it refuse to compile checkpointed layers.
    if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # One graph per kind of pass: how many depths it reads, whether others read it, with or without gradients.
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), _MAX_GRAPHS))
    mixers = {id(mixer) for _, mixer, _ in find_mixers(inner)}
    layers = [module for module in text_backbone(inner).modules() if isinstance(module, GradientCheckpointingLayer)]
    chosen = [layer for layer in layers if mixers.isdisjoint(map(id, layer.modules()))]
    if not chosen:
        raise UnsupportedModelError(
            f"no layer of {type(inner).__name__} can be compiled: all carry a state from token to token; leave out "
            "compile_layers (torch_compile)"
        )
    for layer in chosen:
        layer.compile(**{"fullgraph": True, "dynamic": True, **options})
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_layers` has compiled the model's layers."""
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return any(layer._compiled_call_impl is not None for layer in layers)
