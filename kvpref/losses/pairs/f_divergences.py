"""f-divergences between policy and reference: the implicit reward of a log-ratio under each.

Wang et al. 2023 (f-DPO, arXiv 2309.16240): with ``t = pi / ref`` and the divergence that f generates, the implicit
reward is ``beta f'(t)``, up to a term that cancels between two responses to one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

_MAX_EXPONENT = 80.0  # its exp is finite in float32 and bfloat16


def _reverse_kl(log_ratios: torch.Tensor, alpha: float) -> torch.Tensor:
    return log_ratios


def _forward_kl(log_ratios: torch.Tensor, alpha: float) -> torch.Tensor:
    return 1 - torch.exp((-log_ratios).clamp(max=_MAX_EXPONENT))


def _js(log_ratios: torch.Tensor, alpha: float) -> torch.Tensor:
    return math.log(2) + logsigmoid(log_ratios)


def _alpha(log_ratios: torch.Tensor, alpha: float) -> torch.Tensor:
    if alpha == 1:
        return log_ratios
    power = alpha - 1
    return torch.expm1((power * log_ratios).clamp(max=_MAX_EXPONENT)) / power


DIVERGENCES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js": _js,
    "alpha": _alpha,
}
"""``f'(t)`` by name, as functions of ``log t`` and of the coefficient of ``alpha``:

``reverse_kl``: ``log t``; ``forward_kl``: ``1 - 1 / t``; ``js``: ``log(2 t / (t + 1))``; ``alpha``:
``(t^(alpha - 1) - 1) / (alpha - 1)``, which is ``log t`` at 1. A constant in f' cancels between two responses.
"""
