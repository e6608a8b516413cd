"""Put the results of a layer's blocks together: outputs merge by log-sum-exp, query gradients add up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch

Partial = tuple[torch.Tensor, torch.Tensor]


def merge_partials(partials: Sequence[Partial], dtype: torch.dtype) -> Partial:
    """Combine attention over disjoint key sets into attention over their union.

    ``lse = logsumexp_i(lse_i)``, ``out = sum_i exp(lse_i - lse) * out_i``.

    Args:
        partials: Per block, out (T, H, D) and lse (H, T), natural log, fp32 or fp64; a row that saw no key has
            lse = -inf. Every row must have seen a key in at least one block.
        dtype: Of the result; the merge itself computes in the dtype of lse.

    Returns:
        The merged out (T, H, D) in `dtype`, and lse (H, T).
    """
    if len(partials) == 1:
        return partials[0][0].to(dtype), partials[0][1]
    if partials[0][0].is_cuda and partials[0][1].dtype == torch.float32 and _has_triton():
        return _merge_fused(partials, dtype)
    lses = torch.stack([lse for _, lse in partials])
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse).transpose(1, 2).unsqueeze(-1)
    out = weights[0] * partials[0][0]
    for weight, (partial, _) in zip(weights[1:], partials[1:], strict=True):
        out = torch.addcmul(out, weight, partial.to(out.dtype))
    return out.to(dtype), lse


def _merge_fused(partials: Sequence[Partial], dtype: torch.dtype) -> Partial:
    from kvpref.attention.merge_triton import merge_two  # Triton is not there on every machine

    merged = partials[0]
    for index, partial in enumerate(partials[1:], start=2):
        # Intermediate results stay in fp32, so the result is rounded once.
        merged = merge_two(merged, partial, dtype if index == len(partials) else torch.float32)
    return merged


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def accumulate(grads: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The sum of gradients of one shape, added in fp32 (fp64 for fp64) and rounded to `dtype` once."""
    if len(grads) == 1:
        return grads[0].to(dtype)
    if len(grads) == 2:
        # One addition rounds its exact result once, so 16-bit terms need no wider copy.
        return torch.add(*grads).to(dtype)
    total = grads[0] if grads[0].dtype == torch.float64 else grads[0].float()
    for grad in grads[1:]:
        total = total + grad
    return total.to(dtype)
