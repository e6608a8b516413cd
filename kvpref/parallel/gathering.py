"""Gathering objects from all ranks, for log lines and messages, not for steps."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

T = TypeVar("T")


def gather(own: T, world_size: int) -> list[T]:
    """The objects of all ranks, in order of rank. All ranks have to call it.

    Args:
        own: This rank's object; it is pickled if there are several ranks.
        world_size: Number of ranks.
    """
    if world_size == 1:
        return [own]
    ranks: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(ranks, own)
    return ranks
