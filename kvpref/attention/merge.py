"""Merge partial attention results by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Partial = tuple[torch.Tensor, torch.Tensor]


def merge_partials(partials: Sequence[Partial]) -> Partial:
    """Combine attention over disjoint key sets into attention over their union.

    ``lse = logsumexp_i(lse_i)``, ``out = sum_i exp(lse_i - lse) * out_i``.

    Args:
        partials: Per block, out (T, H, D) and lse (H, T), natural log, fp32 or fp64; a row that saw no key has
            lse = -inf. Every row must have seen a key in at least one block.

    Returns:
        The merged out (T, H, D) in the dtype of lse (or of out where there is one partial), and lse (H, T).
    """
    if len(partials) == 1:
        return partials[0]
    lses = torch.stack([lse for _, lse in partials])
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse).transpose(1, 2).unsqueeze(-1)
    out = weights[0] * partials[0][0]
    for weight, (partial, _) in zip(weights[1:], partials[1:], strict=True):
        out = torch.addcmul(out, weight, partial.to(out.dtype))
    return out, lse
