"""CPU stand-ins for the kernel functions of FlashAttention-2 and -4, with their recorded signatures."""

from __future__ import annotations

from typing import Any

import torch
from stand_in_kernels import INF, NAN, Tensor, block_of, compute_forward, write_gradients


class FlashAttention2:
    """`flash_attn.flash_attn_interface` of flash-attn 2.8.3; 2.7.0 has neither zero_tensors argument."""

    def __init__(self) -> None:
        self.deterministic: list[bool] = []

    def _flash_attn_varlen_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
        block_table: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
        zero_tensors: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert dropout_p == 0.0
        assert alibi_slopes is block_table is leftpad_k is seqused_k is None
        assert not return_softmax
        if max_seqlen_q == 1 and q.shape[1] > k.shape[1]:  # csrc/flash_attn/flash_api.cpp: seqlenq_ngroups_swapped
            q.reshape(cu_seqlens_q.shape[0] - 1, k.shape[1], -1, q.shape[2])
        window = (window_size_left, window_size_right)
        block = block_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window)
        out, lse = compute_forward(q, k, v, block, softmax_scale, softcap)
        return out, lse.masked_fill(lse == -INF, INF), torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
        zero_tensors: bool = False,
    ) -> Tensor:
        assert dropout_p == 0.0
        assert alibi_slopes is rng_state is None
        self.deterministic.append(deterministic)
        window = (window_size_left, window_size_right)
        block = block_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window)
        write_gradients((dq, dk, dv), (dout, q, k, v, out, softmax_lse), block, softmax_scale, softcap)
        return torch.empty(q.shape[1], q.shape[0])


class FlashAttention4:
    """`flash_attn.cute.interface` since 4.0.0.beta0, less what kvpref leaves out; what moved is keyword-only here."""

    def __init__(self) -> None:
        self.deterministic: list[bool] = []

    def _flash_attn_fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        return_lse: bool = False,
    ) -> tuple[Any, ...]:
        block = block_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        out, lse = compute_forward(q, k, v, block, softmax_scale)
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        deterministic: bool = False,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        self.deterministic.append(deterministic)
        dq, dk, dv = (
            torch.full_like(like, NAN) if grad is None else grad
            for grad, like in zip((dq, dk, dv), (q, k, v), strict=True)
        )
        block = block_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        write_gradients((dq, dk, dv), (dout, q, k, v, out, lse), block, softmax_scale)
        return dq, dk, dv


class FlashAttention4WithExtras(FlashAttention4):
    """Since June 2026 the forward returns two more values."""

    def _flash_attn_fwd(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return *super()._flash_attn_fwd(*args, **kwargs), None, None
