"""How fast plain matrix products run here: an upper bound for training steps."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_SIZES = {"cpu": 256, "cuda": 4096}
"""Rows and columns: large enough to fill the device, and done in milliseconds except for bf16 on old CPUs."""

_REPEATS = {"cpu": 2, "cuda": 20}


def measure_matrix_rate(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOPs per second of square matrix products, the best of three rounds; takes a fraction of a second.

    Args:
        device: CPU or CUDA.
        dtype: Dtype of the products, such as bfloat16 under autocast.
        clock: Gives the time in seconds.
    """
    size, repeats = _SIZES.get(device.type, 256), _REPEATS.get(device.type, 2)
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    _run(left, right, 1)
    rounds = []
    for _ in range(3):
        start = clock()
        _run(left, right, repeats)
        rounds.append(clock() - start)
    return 2 * size**3 * repeats / max(min(rounds), 1e-9)


def _run(left: torch.Tensor, right: torch.Tensor, repeats: int) -> None:
    for _ in range(repeats):
        torch.mm(left, right)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
