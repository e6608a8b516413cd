"""What a device computes in."""

from __future__ import annotations

import torch


def device_has_bf16() -> bool:
    """Whether the GPU computes in bf16 by itself; PyTorch also emulates it on older ones, which is slow."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
