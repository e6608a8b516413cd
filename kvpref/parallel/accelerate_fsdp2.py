"""FSDP2 as accelerate applies it: on any device, in the precision that log-probs need, and to more than one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_up_fsdp2(accelerator: Accelerator, settings: Mapping[str, Any] | None, *, is_asked: bool) -> None:
    """Make an accelerator that was asked for FSDP2 shard what it prepares, on CPUs too.

    accelerate supports FSDP only on accelerators, and silently runs DistributedDataParallel on CPUs. With mixed
    precision it would round the outermost module's output, the log-probs, to 16 bits, and sum gradients over ranks in
    16 bits; only weights and layers should be in 16 bits.

    Args:
        accelerator: A new accelerator.
        settings: Settings of accelerate's plug-in; None for those of `accelerate launch`.
        is_asked: Whether FSDP is wanted.
    """
    if not is_asked:
        return
    state: Any = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**(settings or {}))
    # Each `AcceleratorState()`, some made by accelerate itself, takes over the partial state.
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    precision = _PRECISIONS.get(accelerator.mixed_precision)
    if precision is not None:
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=precision, reduce_dtype=torch.float32
        )


def shard_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Shard a model that is not trained, in place, with the function that shards the trained one in `prepare`."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with _layers_of(accelerator.state.fsdp_plugin, model):
        sharded: nn.Module = fsdp2_prepare_model(accelerator, model)
    return sharded.eval()


@contextmanager
def _layers_of(plugin: Any, model: nn.Module) -> Iterator[None]:
    """Let a plug-in wrap another model's layers; it would otherwise keep the layer names of the first."""
    kept = plugin.transformer_cls_names_to_wrap
    if kept is not None and not set(kept) <= {type(module).__name__ for module in model.modules()}:
        plugin.transformer_cls_names_to_wrap = list(getattr(model, "_no_split_modules", None) or kept)
    try:
        yield
    finally:
        plugin.transformer_cls_names_to_wrap = kept


def is_fsdp2(model: nn.Module) -> bool:
    """Whether a model is sharded by FSDP2."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
