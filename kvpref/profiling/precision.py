"""bf16 autocast for measured steps, by the same means as in training."""

from __future__ import annotations

import torch
from torch import nn

from kvpref.models.precision import device_has_bf16

_UNCAST = "_original_forward"
"""Where accelerate keeps the forward that it wraps."""


def use_autocast(model: nn.Module, wanted: bool | None) -> None:
    """Make the model's forward run in bf16 autocast from now on.

    Args:
        model: An attached model.
        wanted: Whether to; None decides as in training: if the GPU computes in bf16 and the weights are float32.
    """
    from accelerate.utils import convert_outputs_to_fp32

    if wanted is None:
        wanted = device_has_bf16() and next(model.parameters()).dtype == torch.float32
    if wanted:
        # What accelerate does to a model that it prepares, without its process-wide state.
        autocast = torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)
        forward = model.forward
        setattr(model, _UNCAST, forward)
        model.forward = convert_outputs_to_fp32(autocast(forward))


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that linear layers compute in: that of the weights, or of autocast."""
    return torch.bfloat16 if hasattr(model, _UNCAST) else next(model.parameters()).dtype
