"""`cuda_flash`: FlashAttention-2 as shipped inside PyTorch; one varlen kernel launch per block."""

from __future__ import annotations

import torch

from kvpref.ops.attention.backends import flash_kernels, torch_flash
from kvpref.ops.attention.backends.interface import Abilities, Backend, Needs
from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.ops.attention.splitting import CallLimits


class CudaFlash(Backend):
    """fp16 and bf16 on compute capability 8.0 and later, native GQA, no extra package.

    The kernel's masks are aligned to the bottom right, which here equals the usual alignment because they are on
    squares only. Determinism is the kernel's own rule, which all backends follow. Refused while
    other kernels stand in for the operator, because results would be those of another package under this name.
    """

    name = "cuda_flash"
    can = Abilities(windows=True, anti_causal=True)

    def provider(self) -> str:
        return f"FlashAttention-2 of {super().provider()}"

    def refusal(self, query: torch.Tensor, needs: Needs) -> str | None:
        return flash_kernels.refusal(query, needs) or torch_flash.replaced_reason()

    def call_limits(self, query: torch.Tensor) -> CallLimits:
        return flash_kernels.call_limits(query)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            block.cu_seqlens_q,
            block.cu_seqlens_k,
            flash_kernels.longest_query(block),
            block.max_seqlen_k,
            0.0,
            block.causal,
            False,
            scale=params.scale,
            window_size_left=flash_kernels.window_of(block)[0],
            window_size_right=flash_kernels.window_of(block)[1],
        )
        return out, lse

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
            window_size_left=flash_kernels.window_of(block)[0],
            window_size_right=flash_kernels.window_of(block)[1],
        )
        return dq, dk, dv
