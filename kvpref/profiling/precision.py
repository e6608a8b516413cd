"""bf16 autocast for steps that are measured, by the same means as in training."""

from __future__ import annotations

import torch
from torch import nn


def use_autocast(model: nn.Module, wanted: bool | None) -> None:
    """Let the model's forward run in bf16 autocast from here on.

    Args:
        model: Attached.
        wanted: None as in training: where the GPU computes in bf16 and the weights are float32.
    """
    from accelerate import Accelerator

    if wanted is None:
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        wanted = has_bf16 and next(model.parameters()).dtype == torch.float32
    if wanted:
        cpu = not torch.cuda.is_available()
        Accelerator(mixed_precision="bf16", cpu=cpu).prepare_model(model, device_placement=False)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that linear layers compute in: that of the weights, or of autocast."""
    return torch.bfloat16 if hasattr(model, "_original_forward") else next(model.parameters()).dtype
