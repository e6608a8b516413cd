"""`xformers`: FlashAttention-2 through xFormers' partial attention; one varlen kernel launch per block."""

from __future__ import annotations

from typing import Any

import torch

from kvpref.attention.backends.interface import Backend
from kvpref.attention.backends.optional_package import OptionalPackage
from kvpref.attention.block import AttentionParams, VarlenBlock

_MAX_HEAD_DIM = 256


class Xformers(Backend):
    """fp16 and bf16 on compute capability 8.0 and later, package xformers 0.0.33 and later.

    The operators are named, not left to xFormers' own choice: others cannot run partial attention or keep the
    log-sum-exp in another layout. The forward pass has native GQA; the backward operator has not, so keys and values
    are copied per query head there.
    """

    name = "xformers"
    package = OptionalPackage(
        module="xformers.ops.fmha",
        distribution="xformers",
        minimum_version="0.0.33",
        install='pip install "kvpref[xformers]"',
    )

    def unsupported_reason(self, query: torch.Tensor) -> str | None:
        if query.device.type != "cuda":
            return f"it runs on CUDA tensors only, got device {query.device.type!r}"
        if query.dtype not in (torch.float16, torch.bfloat16):
            return f"it needs float16 or bfloat16, got {query.dtype}; load the model in bf16 or use autocast"
        if query.shape[-1] > _MAX_HEAD_DIM or query.shape[-1] % 8:
            return f"it needs a head dim that is a multiple of 8 and at most {_MAX_HEAD_DIM}, got {query.shape[-1]}"
        if torch.cuda.get_device_capability(query.device) < (8, 0):
            return "it needs compute capability 8.0 or later (Ampere)"
        reason = self.package.missing_reason()
        if reason is None and not self.package.load().flash.FwOp.is_available():
            return (
                f"this xformers was built without FlashAttention for this torch; reinstall it: {self.package.install}"
            )
        return reason

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fmha, num_kv_heads = self.package.load(), k.shape[1]
        group_size = q.shape[1] // num_kv_heads
        # xFormers' GQA layout (1, rows, G, H/G, D); a stride of zero tells it that the keys of a group are one.
        key, value = (rows.unsqueeze(2).expand(-1, -1, group_size, -1).unsqueeze(0) for rows in (k, v))
        out, lse = fmha.memory_efficient_attention_partial(
            q.unflatten(1, (num_kv_heads, group_size)).unsqueeze(0),
            key,
            value,
            attn_bias=_bias(fmha.attn_bias, block),
            scale=params.scale,
            op=fmha.flash.FwOp,
        )
        lse = lse[0].flatten(0, 1)  # (1, G, H/G, T) -> (H, T)
        # The kernel reports +inf for a row that saw no key.
        return out[0].flatten(1, 2), lse.masked_fill(lse == float("inf"), float("-inf"))

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
        fmha, num_kv_heads = self.package.load(), k.shape[1]
        group_size = q.shape[1] // num_kv_heads
        key, value = (rows.repeat_interleave(group_size, dim=1) if group_size > 1 else rows for rows in (k, v))
        dq, dk, dv = fmha.memory_efficient_attention_backward(
            dout.contiguous().unsqueeze(0),
            out.unsqueeze(0),
            lse.contiguous().unsqueeze(0),
            q.unsqueeze(0),
            key.unsqueeze(0),
            value.unsqueeze(0),
            attn_bias=_bias(fmha.attn_bias, block),
            scale=params.scale,
            op=fmha.flash.BwOp,
        )
        dk, dv = (grad[0].unflatten(1, (num_kv_heads, group_size)).sum(dim=2) for grad in (dk, dv))
        return dq[0], dk, dv


def _bias(attn_bias: Any, block: VarlenBlock) -> Any:
    """xFormers' description of the block, on the offsets that are on the device already.

    Its public constructors take lengths on the host and copy them to the device, once per layer.
    """
    # With at most one query per pair, the kernel's GQA path reshapes the rows and fails if a pair has none; the
    # longest query is an upper bound for the kernel, so 2 keeps it on the general path.
    queries = _lengths(attn_bias, block.cu_seqlens_q, max(block.max_seqlen_q, 2), block.num_queries)
    if block.causal:
        return attn_bias.BlockDiagonalCausalMask(q_seqinfo=queries, k_seqinfo=queries)
    keys = _lengths(attn_bias, block.cu_seqlens_k, block.max_seqlen_k, block.num_keys)
    return attn_bias.BlockDiagonalMask(q_seqinfo=queries, k_seqinfo=keys)


def _lengths(attn_bias: Any, cu_seqlens: torch.Tensor, longest: int, num_rows: int) -> Any:
    # The FlashAttention operators read `seqstart_py` only to see that causal queries and keys agree.
    return attn_bias._SeqLenInfo(seqstart=cu_seqlens, max_seqlen=longest, min_seqlen=0, seqstart_py=[0, num_rows])
