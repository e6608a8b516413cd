"""Whether weights are spread over ranks: FSDP, DeepSpeed ZeRO-3."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are in pieces, or may be: DeepSpeed does not say."""
    sharded = (FSDPModule, FullyShardedDataParallel)
    return type(model).__name__ == "DeepSpeedEngine" or any(isinstance(module, sharded) for module in model.modules())


def will_be_sharded() -> bool:
    """Whether accelerate has been told to shard the models that it prepares."""
    from accelerate.state import AcceleratorState  # the engine alone does without accelerate

    state = AcceleratorState()
    return getattr(state, "fsdp_plugin", None) is not None or is_zero_3(getattr(state, "deepspeed_plugin", None))


def is_zero_3(deepspeed_plugin: Any) -> bool:
    """Whether accelerate's plug-in for DeepSpeed, or None, spreads the weights and not only optimizer state."""
    return getattr(deepspeed_plugin, "zero_stage", 0) == 3
