"""Copies from the host to the device that do not make the host wait."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; the same tensor if it is already there.

    A copy to CUDA from ordinary memory first waits for all work queued on the device; one from page-locked memory joins
    the queue.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_initialized():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
