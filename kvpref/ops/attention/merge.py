"""Combine the results of a layer's blocks: outputs merge by log-sum-exp, query gradients add up."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

Partial = tuple[torch.Tensor, torch.Tensor]


def merge_partials(first: Partial, second: Partial, dtype: torch.dtype) -> Partial:
    """Combine attention over two disjoint key sets into attention over their union.

    ``lse = log(exp(lse_1) + exp(lse_2))``, ``out = exp(lse_1 - lse) * out_1 + exp(lse_2 - lse) * out_2``.

    Args:
        first: out (T, H, D) and lse (H, T), natural log, fp32 or fp64; a row that saw no key has lse = -inf, or +inf as
            FlashAttention-2 reports it.
        second: The same over other keys.
        dtype: The dtype of the result; the merge itself computes in the dtype of lse.

    Returns:
        The merged out (T, H, D) in `dtype`, and lse (H, T). They may reuse the memory of `first`.
    """
    if first[0].is_cuda and first[1].dtype == torch.float32 and _has_triton():
        from kvpref.ops.attention.merge_triton import merge_two  # Triton is not installed everywhere

        return merge_two(first, second, dtype)
    first_lse, second_lse = (lse.masked_fill(lse == float("inf"), float("-inf")) for _, lse in (first, second))
    lse = torch.logaddexp(first_lse, second_lse)
    finite = _finite(lse)
    first_weight, second_weight = (torch.exp(part - finite).T.unsqueeze(-1) for part in (first_lse, second_lse))
    out = torch.addcmul(first_weight * first[0], second_weight, second[0].to(lse.dtype))
    return out.to(dtype), lse


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """lse with 0 in place of -inf: a row that saw no key gets weights of zero, not inf - inf."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def merge_sink(partial: Partial, sink: torch.Tensor, dtype: torch.dtype) -> Partial:
    """Let every row share its attention with a sink, an extra logit whose value is zero.

    ``lse' = log(exp(lse) + exp(sink))``, ``out' = exp(lse - lse') * out``.

    Args:
        partial: out (T, H, D) and lse (H, T) over all keys.
        sink: (H,) a logit per head, any float dtype.
        dtype: The dtype of the result; the arithmetic is in the dtype of lse.
    """
    out, lse = partial
    lse = lse.masked_fill(lse == float("inf"), float("-inf"))
    total = torch.logaddexp(lse, sink.to(lse.dtype).unsqueeze(1))
    return (torch.exp(lse - _finite(total)).T.unsqueeze(-1) * out).to(dtype), total


def gradient_of_sink(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """``-sum_t exp(sink - lse_t) * <dout_t, out_t>`` per head, with the merged out and lse; (H,), the sink's dtype."""
    share = torch.exp(sink.to(lse.dtype).unsqueeze(1) - lse)
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).T
    return -(share * delta).sum(1).to(sink.dtype)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def add_gradient(total: torch.Tensor, grad: torch.Tensor, *, is_last: bool) -> torch.Tensor:
    """Add one term to a sum of gradients, kept in fp32 (fp64 for fp64) between the first and the last.

    Returns:
        The sum, in the memory of `total` if possible.
    """
    if is_last:
        # One addition rounds its exact result once, so two 16-bit terms need no wider copy.
        return total + grad
    return (total if total.dtype == torch.float64 else total.float()).add_(grad)
