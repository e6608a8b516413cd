"""Which wrapper is around a model."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kvpref.parallel.ddp import DdpWrapper
from kvpref.parallel.deepspeed import DeepSpeedWrapper, is_deepspeed
from kvpref.parallel.fsdp2 import Fsdp2Wrapper
from kvpref.parallel.fsdp2_groups import fsdp2_modules
from kvpref.parallel.plain import Wrapper
from kvpref.parallel.sharding import Sharding, refuse_fsdp1


def wrapper_of(model: nn.Module, sharding: Sharding | None = None) -> Wrapper:
    """The wrapper that says what the engine has to do around the passes of a model.

    Args:
        model: Attached, possibly wrapped.
        sharding: How long weights stay gathered, and when gradients are reduced, in the bounded schedule.

    Raises:
        UnsupportedModelError: If the wrapper has not been shown to be exact.
    """
    if isinstance(model, DistributedDataParallel):
        return DdpWrapper(model)
    if fsdp2_modules(model):
        return Fsdp2Wrapper(model, sharding or Sharding())
    if is_deepspeed(model):
        return DeepSpeedWrapper(model)
    refuse_fsdp1(model)
    return Wrapper(model)
