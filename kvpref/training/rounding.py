"""Whether 16-bit weights can follow a learning rate: a step that is small relative to a weight is rounded away."""

from __future__ import annotations

import warnings

import torch
from torch import nn

_HALF = (torch.bfloat16, torch.float16)
_MAX_LOOKED_AT = 2**16
"""Number of weights of one parameter that are examined, evenly spread."""

_STEPS_OF_ITS_SIZE = ("adam", "lion")
"""Optimizers whose steps are about as large as the learning rate."""


def warn_of_lost_steps(model: nn.Module, learning_rate: float, optimizer: str) -> None:
    """Warn if a step of the learning rate's size leaves more than half of the trained weights unchanged.

    Args:
        model: The trained model.
        learning_rate: The peak learning rate.
        optimizer: transformers' name of the optimizer; those with steps of other sizes are skipped.
    """
    if learning_rate <= 0 or not any(name in optimizer for name in _STEPS_OF_ITS_SIZE):
        return
    lost = lost_share(model, learning_rate)
    if lost <= 0.5:
        return
    dtypes = sorted({str(item.dtype).removeprefix("torch.") for item in _trained(model) if item.dtype in _HALF})
    warnings.warn(
        f"{lost:.1%} of the trained weights are too large, in {' and '.join(dtypes)}, for a step of the learning rate "
        f"{learning_rate:g}: it is rounded away, and they stay as they are; train float32 weights with bf16 autocast "
        "(dtype float32, bf16=True; kvpref train --dtype float32), or an adapter",
        stacklevel=3,
    )


@torch.no_grad()
def lost_share(model: nn.Module, step: float) -> float:
    """The share of the trained weights that a step of this size, up or down, leaves unchanged; 0 in float32.

    Weights of exactly 0, such as a fresh adapter's, can be moved by any step.
    """
    num_weights = num_lost = 0.0
    for parameter in _trained(model):
        num_weights += parameter.numel()
        if parameter.dtype not in _HALF or not parameter.numel():
            continue
        seen = parameter.detach().flatten()[:: max(1, parameter.numel() // _MAX_LOOKED_AT)]
        wide = seen.float()
        stays = ((wide + step).to(seen.dtype) == seen) & ((wide - step).to(seen.dtype) == seen)
        num_lost += stays.float().mean().item() * parameter.numel()
    return num_lost / num_weights if num_weights else 0.0


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
