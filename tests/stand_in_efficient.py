"""CPU stand-ins for PyTorch's memory-efficient attention operators, which exist on CUDA only.

Shape legend: N pairs, H heads.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from stand_in_kernels import INF, NAN, Tensor, block_of, compute_forward, rows_without, write_gradients


def efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
    seqlen_k: None = None,
    window_size: None = None,
) -> tuple[Any, ...]:
    """`aten::_efficient_attention_forward` on CUDA: lse (N, H, longest query rounded up to 32)."""
    assert (bias, dropout_p, compute_log_sumexp, seqlen_k, window_size) == (None, 0.0, True, None, None)
    assert query.shape[0] == key.shape[0] == value.shape[0] == 1
    assert query.shape[2:] == key.shape[2:] == value.shape[2:], "no GQA"
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    block = block_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, custom_mask_type)
    out, lse = compute_forward(query[0], key[0], value[0], block, scale)
    out[rows_without(cu_seqlens_q, cu_seqlens_k)] = NAN
    width = (max_seqlen_q + 31) // 32 * 32
    padded = lse.new_full((cu_seqlens_q.shape[0] - 1, query.shape[2], width), NAN)
    for pair, (start, end) in enumerate(pairwise(cu_seqlens_q.tolist())):
        padded[pair, :, : end - start] = lse[:, start:end]
    return out.unsqueeze(0), padded, torch.empty(0), torch.empty(0), max_seqlen_q, max_seqlen_k


def efficient_attention_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: Tensor,
    dropout_p: float,
    philox_seed: Tensor,
    philox_offset: Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float | None = None,
    num_splits_key: None = None,
    window_size: None = None,
    shared_storage_dqdkdv: bool = False,
) -> tuple[Tensor, ...]:
    """`aten::_efficient_attention_backward` on CUDA: gradients per query head, lse as the forward pads it."""
    assert (bias, dropout_p, bias_requires_grad, window_size) == (None, 0.0, False, None)
    assert not shared_storage_dqdkdv
    assert isinstance(philox_seed, Tensor)
    assert isinstance(philox_offset, Tensor)
    assert max_seqlen_q <= query.shape[1]
    assert max_seqlen_k <= key.shape[1]
    assert query.shape[2:] == key.shape[2:] == value.shape[2:], "no GQA"
    assert out.is_contiguous(), "the kernel takes the row stride of out from its shape"
    num_pairs, num_heads, width = logsumexp.shape
    assert (num_pairs, num_heads) == (cu_seqlens_q.shape[0] - 1, query.shape[2])
    assert width % 32 == 0, "LSE is not correctly aligned"
    assert width >= max_seqlen_q
    assert logsumexp.is_contiguous()
    lse = torch.full((num_heads, query.shape[1]), NAN, dtype=logsumexp.dtype)
    for pair, (start, end) in enumerate(pairwise(cu_seqlens_q.tolist())):
        lse[:, start:end] = logsumexp[pair, :, : end - start]
        # A tile reads past the last query of a pair: exp(score - inf) must leave nothing there.
        assert (logsumexp[pair, :, end - start :] == INF).all()
    block = block_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, custom_mask_type)
    grads = tuple(torch.full_like(t[0], NAN, memory_format=torch.contiguous_format) for t in (query, key, value))
    write_gradients(grads, (grad_out_[0], query[0], key[0], value[0], out[0], lse), block, scale)
    return *(grad.unsqueeze(0) for grad in grads), torch.empty(0)
