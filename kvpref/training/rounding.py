"""Whether weights of 16 bits can follow a learning rate: a step that is small against a weight is rounded away."""

from __future__ import annotations

import warnings

import torch
from torch import nn

_HALF = (torch.bfloat16, torch.float16)
_MAX_LOOKED_AT = 2**16
"""Weights of one parameter that are looked at, evenly spread."""

_STEPS_OF_ITS_SIZE = ("adam", "lion")
"""Optimizers whose steps are about as large as the learning rate."""


def warn_of_lost_steps(model: nn.Module, learning_rate: float, optimizer: str) -> None:
    """Warn if more than half of the trained weights stay as they are in a step of the learning rate's size.

    Args:
        model: As it is trained.
        learning_rate: The peak.
        optimizer: Its name among transformers'; those whose steps have other sizes are passed over.
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
    """The share of the trained weights that a step of this size, up or down, leaves as they are; 0 in float32.

    Weights of exactly 0, a fresh adapter's say, can be moved by any step.
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
