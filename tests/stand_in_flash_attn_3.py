"""CPU stand-ins for the kernel functions of FlashAttention-3, with their recorded signatures."""

from __future__ import annotations

import torch
from stand_in_kernels import Tensor, block_of, compute_forward, write_gradients


class FlashAttention3:
    """`flash_attn_interface`, the folder hopper since November 2025."""

    def __init__(self) -> None:
        self.deterministic: list[bool] = []

    def _flash_attn_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: None = None,
        v_new: None = None,
        qv: None = None,
        out_: None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cu_seqlens_k_new: None = None,
        seqused_q: None = None,
        seqused_k: None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        page_table: None = None,
        kv_batch_idx: None = None,
        leftpad_k: None = None,
        rotary_cos: None = None,
        rotary_sin: None = None,
        seqlens_rotary: None = None,
        q_descale: None = None,
        k_descale: None = None,
        v_descale: None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: None = None,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
    ) -> tuple[Tensor, ...]:
        assert k_new is v_new is qv is out_ is cu_seqlens_k_new is seqused_q is seqused_k is page_table is None
        assert kv_batch_idx is leftpad_k is rotary_cos is rotary_sin is seqlens_rotary is None
        assert q_descale is k_descale is v_descale is None
        assert attention_chunk == 0
        window = (window_size_left, window_size_right)
        block = block_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window)
        return *compute_forward(q, k, v, block, softmax_scale, softcap), torch.tensor([]), torch.tensor([])

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        sequed_q: None = None,
        sequed_k: None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Tensor:
        assert sequed_q is sequed_k is None
        self.deterministic.append(deterministic)
        window = (window_size_left, window_size_right)
        block = block_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, window)
        write_gradients((dq, dk, dv), (dout, q, k, v, out, softmax_lse), block, softmax_scale, softcap)
        return torch.empty(q.shape[1], q.shape[0])


class FlashAttention3Of2025(FlashAttention3):
    """From April to November 2025: no defaults, other names, windows as pairs, backward returns four tensors."""

    def _flash_attn_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: None,
        v_new: None,
        qv: None,
        out: None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        cu_seqlens_k_new: None,
        seqused_q: None,
        seqused_k: None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        page_table: None,
        kv_batch_idx: None,
        leftpad_k: None,
        rotary_cos: None,
        rotary_sin: None,
        seqlens_rotary: None,
        q_descale: None,
        k_descale: None,
        v_descale: None,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: None = None,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
    ) -> tuple[Tensor, ...]:
        assert attention_chunk == 0
        new = (k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k)
        paged = (page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary)
        descale = (q_descale, k_descale, v_descale)
        return super()._flash_attn_forward(
            q,
            k,
            v,
            *new,
            max_seqlen_q,
            max_seqlen_k,
            *paged,
            *descale,
            softmax_scale,
            causal,
            *window_size,
            softcap=softcap,
        )

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        sequed_q: None,
        sequed_k: None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> tuple[Tensor, ...]:
        offsets = (cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k)
        inputs = (dout, q, k, v, out, softmax_lse)
        rest = (softmax_scale, causal, *window_size, softcap)
        return (
            dq,
            dk,
            dv,
            super()._flash_attn_backward(*inputs, *offsets, dq, dk, dv, *rest, deterministic=deterministic),
        )
