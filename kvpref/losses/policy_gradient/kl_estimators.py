"""Estimators of the KL divergence of a policy from its reference, from log-probs of samples."""

from __future__ import annotations

from collections.abc import Callable

import torch

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped here before `exp`, so that a response impossible under one model gives no infinity."""

Estimator = Callable[[torch.Tensor], torch.Tensor]


def _k1(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio


def _k2(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio**2 / 2


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    return torch.expm1((-log_ratio).clamp(max=MAX_LOG_RATIO)) + log_ratio


KL_ESTIMATORS: dict[str, Estimator] = {"k1": _k1, "k2": _k2, "k3": _k3}
"""Estimators of KL(policy, reference) from (S,) d = log policy - log reference of tokens it drew (Schulman 2020,
http://joschu.net/blog/kl-approx.html): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. As a term of a loss, without an
importance ratio, k1 has a gradient of mean 0, k2 that of the KL, k3 that of KL(reference, policy)."""
