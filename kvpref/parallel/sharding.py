"""Whether weights are spread over ranks (FSDP, DeepSpeed ZeRO-3), and how the bounded schedule handles that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from kvpref.errors import UnsupportedModelError

TIMES = ("chunk", "step")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How often the bounded schedule gathers weights and reduces gradients."""

    gather_weights: str = "chunk"
    """``chunk`` gathers a layer for one chunk's forward or backward pass, ``step`` keeps all until the step's end."""

    reduce_grads: str = "chunk"
    """``chunk`` reduces each chunk's gradients, ``step`` keeps whole ones on every rank and reduces them once."""


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are sharded, or may be: DeepSpeed does not say."""
    sharded = (FSDPModule, FullyShardedDataParallel)
    return type(model).__name__ == "DeepSpeedEngine" or any(isinstance(module, sharded) for module in model.modules())


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model whose weights are flattened by the first version of FSDP."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedModelError(
            "FullyShardedDataParallel (the first version of FSDP) gathers weights for one forward pass only, and "
            "kvpref runs several; use FSDP2: fsdp_version 2 in accelerate's configuration, fully_shard in code"
        )


def will_be_sharded() -> bool:
    """Whether accelerate has been told to shard the models that it prepares."""
    from accelerate.state import AcceleratorState  # the engine alone does without accelerate

    state = AcceleratorState()
    return getattr(state, "fsdp_plugin", None) is not None or is_zero_3(getattr(state, "deepspeed_plugin", None))


def gathers_in_passes() -> bool:
    """Whether accelerate gathers weights while ranks compute, as with FSDP; ZeRO-3 does so before a step."""
    from accelerate.state import AcceleratorState  # the engine alone does without accelerate

    return getattr(AcceleratorState(), "fsdp_plugin", None) is not None


def is_zero_3(deepspeed_plugin: Any) -> bool:
    """Whether accelerate's plug-in for DeepSpeed (or None) shards the weights and not only optimizer state."""
    return getattr(deepspeed_plugin, "zero_stage", 0) == 3
