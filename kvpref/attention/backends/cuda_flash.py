"""`cuda_flash`: FlashAttention-2 as shipped inside PyTorch; one varlen kernel launch per block."""

from __future__ import annotations

import torch

from kvpref.attention.backends.interface import Backend
from kvpref.attention.block import AttentionParams, VarlenBlock

_MAX_HEAD_DIM = 256


class CudaFlash(Backend):
    """fp16 and bf16 on compute capability 8.0 and later, native GQA, no extra package.

    The kernel's causal mask is aligned to the bottom right, which equals the usual one here because causal blocks
    have equal query and key ranges.
    """

    name = "cuda_flash"

    def unsupported_reason(self, query: torch.Tensor) -> str | None:
        if query.device.type != "cuda":
            return f"it runs on CUDA tensors only, got device {query.device.type!r}"
        if query.dtype not in (torch.float16, torch.bfloat16):
            return f"it needs float16 or bfloat16, got {query.dtype}; load the model in bf16 or use autocast"
        if query.shape[-1] > _MAX_HEAD_DIM or query.shape[-1] % 8:
            return f"it needs a head dim that is a multiple of 8 and at most {_MAX_HEAD_DIM}, got {query.shape[-1]}"
        if torch.cuda.get_device_capability(query.device) < (8, 0):
            return "it needs compute capability 8.0 or later (Ampere)"
        return None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            block.cu_seqlens_q,
            block.cu_seqlens_k,
            # At 1 the kernel folds the heads of a group into query rows by a reshape that needs as many queries as
            # pairs, which a pair without queries breaks. Any upper bound gives the same numbers.
            max(block.max_seqlen_q, 2),
            block.max_seqlen_k,
            0.0,
            block.causal,
            False,
            scale=params.scale,
        )
        # The kernel reports +inf for a row that saw no key.
        return out, lse.masked_fill(lse == float("inf"), float("-inf"))

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        block: VarlenBlock,
        params: AttentionParams,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The random-number state is read only with dropout, which kvpref refuses.
        rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout.contiguous(),
            q,
            k,
            v,
            out,
            lse.contiguous(),
            block.cu_seqlens_q,
            block.cu_seqlens_k,
            block.max_seqlen_q,
            block.max_seqlen_k,
            0.0,
            block.causal,
            rng_state,
            unused,
            scale=params.scale,
        )
        return dq, dk, dv
