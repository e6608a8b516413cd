"""Which dtypes a device computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def device_has_bf16() -> bool:
    """Whether the GPU computes in bf16 natively; PyTorch emulates it on older ones, which is slow."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def without_cast_cache(device: torch.device) -> Iterator[None]:
    """The current autocast without its cache, which could pass weights cast without a graph to chunks that need one."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False):
        yield
