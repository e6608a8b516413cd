"""accelerate's FSDP2 on gloo ranks: accelerate itself offers it on accelerators alone."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed


def let_accelerate_shard() -> None:
    """Make the next `Accelerator` heed its FSDP plug-in; called after the training arguments, which reset its state."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if not getattr(distributed.barrier, "without_devices", False):
        distributed.barrier = _without_devices(distributed.barrier)


def _without_devices(barrier: Any) -> Any:
    """accelerate names devices to barriers, which gloo does not know."""

    def plain(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return barrier(*args, **kwargs)

    plain.without_devices = True  # type: ignore[attr-defined]
    return plain
