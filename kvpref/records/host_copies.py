"""Copies from the host to the device that do not make the host wait."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; itself if it is there.

    A copy to CUDA from ordinary memory first waits for all that the device has still to do; one from page-locked memory
    takes its place in the queue.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_initialized():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
