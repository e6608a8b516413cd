"""CPU stand-ins for PyTorch's FlashAttention-2 operators, which exist on CUDA only."""

from __future__ import annotations

import torch
from stand_in_kernels import INF, NAN, Tensor, block_of, compute_forward, rows_without, write_gradients


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_forward` on CUDA: a row without keys has +inf."""
    assert (dropout_p, return_debug_mask) == (0.0, False)
    assert max_q > 1, "a reshape of groups that pairs without queries break"
    window = (
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
    )
    block = block_of(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, window)
    out, lse = compute_forward(query, key, value, block, scale)
    return out, lse.masked_fill(lse == -INF, INF), *(torch.empty(0) for _ in range(3))


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_backward` on CUDA."""
    assert dropout_p == 0.0
    assert logsumexp.is_contiguous()
    assert grad_out.is_contiguous()
    window = (
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
    )
    block = block_of(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, window)
    grads = tuple(torch.full_like(t, NAN, memory_format=torch.contiguous_format) for t in (query, key, value))
    for rows, cu_seqlens, other in ((0, cum_seq_q, cum_seq_k), (1, cum_seq_k, cum_seq_q), (2, cum_seq_k, cum_seq_q)):
        grads[rows][rows_without(cu_seqlens, other)] = 0.0  # flash_bwd_kernel.h writes these
    write_gradients(grads, (grad_out, query, key, value, out, logsumexp), block, scale)
    return grads
