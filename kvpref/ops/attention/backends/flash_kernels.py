"""What FlashAttention's varlen kernels have in common, whoever ships them: PyTorch, flash-attn or xFormers."""

from __future__ import annotations

import torch

from kvpref.ops.attention.backends.interface import Needs
from kvpref.ops.attention.block import VarlenBlock
from kvpref.ops.attention.splitting import CallLimits

AMPERE = (8, 0)


def refusal(
    query: torch.Tensor, needs: Needs, max_head_dim: int = 256, min_capability: tuple[int, int] = AMPERE
) -> str | None:
    """Why the kernels cannot serve a query (T, H, D) like this; None if they can."""
    if query.device.type != "cuda":
        return f"it runs on CUDA tensors only, got device {query.device.type!r}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, got {query.dtype}; load the model in bf16 or use autocast"
    head_dim = needs.head_dim(query)
    if head_dim > max_head_dim or head_dim % 8:
        return f"it needs a head dim that is a multiple of 8 and at most {max_head_dim}, got {head_dim}"
    capability = torch.cuda.get_device_capability(query.device)
    if capability < min_capability:
        return f"it needs compute capability {dotted(min_capability)} or later, got {dotted(capability)}"
    return None


def dotted(capability: tuple[int, int]) -> str:
    """(9, 0) -> 9.0"""
    return f"{capability[0]}.{capability[1]}"


def window_of(block: VarlenBlock) -> tuple[int, int]:
    """How many keys a query sees to the left and to the right of its own; -1 for all.

    A window of W tokens counts the query's own. With a causal mask the kernels set the right side to 0; without one,
    (0, -1) is the anti-causal square (`set_params_fprop` in PyTorch 2.13 and flash-attn 2.8.3).
    """
    if block.shape == "anti_causal":
        return 0, -1
    return (-1, -1) if block.window is None else (block.window - 1, 0)


def longest_query(block: VarlenBlock) -> int:
    """The longest query range passed to FlashAttention-2's forward, in tokens: at least 2.

    At 1 the kernel folds the heads of a group into query rows by a reshape that needs as many queries as pairs, and
    fails if a pair has no queries. The number is an upper bound, so a larger one gives the same results.
    """
    return max(block.max_seqlen_q, 2)


def call_limits(query: torch.Tensor) -> CallLimits:
    """Limits of FlashAttention-2's backward: an fp32 accumulator of dq and a row sum, each pair padded by 128 rows.

    Where a pair starts in the accumulator is computed in 32 bits (PyTorch 2.11, flash-attn 2.8.3; in later versions by
    some of the kernels), so a pair that starts beyond that would be written out of bounds.
    """
    num_heads, columns = query.shape[1], rounded_head_dim(query.shape[2])
    return CallLimits(
        num_heads=num_heads,
        row_bytes=num_heads * (columns + 1) * 4,
        pair_rows=128,
        max_start_row=2**31 // (num_heads * columns),
    )


def rounded_head_dim(head_dim: int) -> int:
    """The head dim to which FlashAttention-2's buffers are padded."""
    multiple = 32 if head_dim <= 128 else 64
    return -(-head_dim // multiple) * multiple
