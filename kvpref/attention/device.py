"""The device that kernels start on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make a CUDA tensor's device the current one: Triton and CuTe start kernels there, wherever their tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
