"""The one rule of determinism, for every backend.

Deterministic kernels run if `torch.use_deterministic_algorithms(True)` is on and not in warn-only mode. In warn-only
mode the fast ones run, with one warning per backend: PyTorch's own FlashAttention-2 and memory-efficient kernels do so
(attention_backward.cu), and the others follow them. A backend without a deterministic kernel for a query refuses it.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch


def is_required() -> bool:
    """Whether the same inputs must give the same bits."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def chosen_for(backend: str) -> bool:
    """Whether a backend with both kinds of kernels should run its deterministic ones.

    In warn-only mode the first call warns that this backend runs the others.
    """
    if not is_required() and torch.are_deterministic_algorithms_enabled():
        _warn(backend)
    return is_required()


@cache  # once per backend and process, as PyTorch's own kernels do
def _warn(backend: str) -> None:
    warnings.warn(
        f"the attention backend {backend!r} runs a backward pass that is not deterministic; "
        "torch.use_deterministic_algorithms(True, warn_only=False) selects the deterministic one",
        stacklevel=2,
    )
