"""What micro-batches weigh: their share of the loss units of an optimizer step, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from kvpref.records.host_copies import to_device

Weight = float | torch.Tensor
"""A number, or with several ranks a () float64 tensor on the device, which the host does not wait for."""


def sum_over_ranks(accelerator: Accelerator, count: int) -> int | torch.Tensor:
    """The sum of a count over all ranks; a () float64 tensor on the device where there are several."""
    if accelerator.num_processes == 1:
        return count
    own = to_device(torch.tensor(count, dtype=torch.float64), accelerator.device)
    total: torch.Tensor = accelerator.reduce(own, reduction="sum")
    return total


def shares(units: Sequence[int], total: int | torch.Tensor | None, num_ranks: int) -> list[Weight]:
    """The weight of each micro-batch, times the number of ranks.

    Distributed wrappers average gradients over ranks; the loss is a sum over ranks of weighted means. A step may have
    no unit at all: groups whose responses are all alike, say.

    Args:
        units: Of each micro-batch.
        total: Over all ranks.
        num_ranks: That gradients are averaged over.
    """
    whole = total.clamp(min=1) if isinstance(total, torch.Tensor) else max(1, total or 0)
    return [count * num_ranks / whole for count in units]


def weighted(loss: torch.Tensor, weight: Weight) -> torch.Tensor:
    """A () loss times its weight, in its own dtype."""
    return loss * (weight.to(loss.dtype) if isinstance(weight, torch.Tensor) else weight)
