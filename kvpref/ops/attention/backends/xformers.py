"""`xformers`: FlashAttention-2 through xFormers' partial attention; one varlen kernel launch per block."""

from __future__ import annotations

from typing import Any

import torch

from kvpref.ops.attention.backends import determinism, flash_kernels, torch_flash
from kvpref.ops.attention.backends.interface import Needs
from kvpref.ops.attention.backends.optional_package import OptionalPackage
from kvpref.ops.attention.backends.packaged import PackagedBackend
from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.ops.attention.splitting import CallLimits


class Xformers(PackagedBackend):
    """fp16 and bf16 on compute capability 8.0 and later, package xformers 0.0.33 and later.

    The operators are named, not left to xFormers to choose: others cannot run partial attention or keep the
    log-sum-exp in another layout. The forward pass has native GQA, the backward one does not (``SUPPORTS_BMGHK`` is
    False in 0.0.33 to 0.0.35 and in MSLK, to which its operators move), so keys and values are copied per query head.

    The operators run PyTorch's own kernels (their names end in ``-pt``), by PyTorch's rule of determinism, unless
    flash-attn is installed: then they run that package's, and always its non-deterministic backward.
    """

    name = "xformers"
    cost = "with grouped keys its backward copies keys and values per query head: 2 x keys x heads x head dim numbers"
    package = OptionalPackage(
        module="xformers.ops.fmha",
        distribution="xformers",
        minimum_version="0.0.33",
        install='pip install "kvpref[xformers]"',
    )

    def refusal(self, query: torch.Tensor, needs: Needs) -> str | None:
        reason = flash_kernels.refusal(query, needs) or self.package.missing_reason()
        if reason is not None:
            return reason
        if not self.package.load().flash.FwOp.is_available():
            return (
                f"this xformers was built without FlashAttention for this torch; reinstall it: {self.package.install}"
            )
        if self._runs_torch_kernels():
            reason = torch_flash.replaced_reason()
        elif determinism.is_required():
            operator = self.package.load().flash.BwOp.NAME
            reason = f"its operator {operator} has no deterministic backward; choose cuda_flash or flash_attn"
        return reason or self.probe_failure(query, needs)

    def _runs_torch_kernels(self) -> bool:
        return str(self.package.load().flash.FwOp.NAME).endswith("-pt")

    def call_limits(self, query: torch.Tensor) -> CallLimits:
        return flash_kernels.call_limits(query)

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
        return out[0].flatten(1, 2), lse

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
        if not self._runs_torch_kernels():
            determinism.chosen_for(self.name)  # for its warning only: there is no other kernel
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
    """xFormers' description of the block, built on the offsets already on the device.

    Its public constructors take lengths on the host and copy them to the device, once per layer.
    """
    ends = (block.num_queries, block.num_keys)
    if block.causal:
        # Its check for squares compares the lists on the host, and would miss pairs that lack queries or keys.
        ends = (block.num_queries, block.num_queries)
    queries = _lengths(attn_bias, block.cu_seqlens_q, flash_kernels.longest_query(block), ends[0])
    keys = _lengths(attn_bias, block.cu_seqlens_k, block.max_seqlen_k, ends[1])
    bias = attn_bias.BlockDiagonalCausalMask if block.causal else attn_bias.BlockDiagonalMask
    return bias(q_seqinfo=queries, k_seqinfo=keys)


def _lengths(attn_bias: Any, cu_seqlens: torch.Tensor, longest: int, num_rows: int) -> Any:
    # The FlashAttention operators read `seqstart_py` only for that check.
    return attn_bias._SeqLenInfo(seqstart=cu_seqlens, max_seqlen=longest, min_seqlen=0, seqstart_py=[0, num_rows])
