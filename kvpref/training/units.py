"""The weights of micro-batches: their share of the loss units of an optimizer step, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from kvpref.records.host_copies import to_device

Weight = float | torch.Tensor
"""A number or, with several ranks, a () float64 tensor on the device, which the host does not wait for."""


def sum_over_ranks(accelerator: Accelerator, count: float, ranks_per_count: int = 1) -> float | torch.Tensor:
    """The sum of a count over all ranks; a () float64 tensor on the device if there are several.

    Args:
        accelerator: The accelerator of all ranks.
        count: This rank's count.
        ranks_per_count: Number of ranks that share micro-batches and so have the same count.
    """
    if accelerator.num_processes == 1:
        return count
    own = to_device(torch.tensor(count, dtype=torch.float64), accelerator.device)
    total: torch.Tensor = accelerator.reduce(own, reduction="sum")
    return total / ranks_per_count


def shares(units: Sequence[float], total: float | torch.Tensor | None, num_ranks: int) -> list[Weight]:
    """The weight of each micro-batch, times the number of ranks.

    Distributed wrappers average gradients over ranks; the loss is a sum over ranks of weighted means. If ranks share
    the tokens of a micro-batch, each has a part of its gradient, so the sum over all ranks is right there too. A step
    may have no units at all, for example if all groups have equal responses.

    Args:
        units: Units of each micro-batch.
        total: Units over all ranks, counting each micro-batch once.
        num_ranks: Number of ranks that gradients are averaged over.
    """
    whole = total.where(total > 0, 1) if isinstance(total, torch.Tensor) else total or 1
    return [count * num_ranks / whole for count in units]


def weighted(loss: torch.Tensor, weight: Weight) -> torch.Tensor:
    """A () loss times its weight, in its own dtype."""
    return loss * (weight.to(loss.dtype) if isinstance(weight, torch.Tensor) else weight)
