"""`efficient`: PyTorch's memory-efficient attention (xFormers' CUTLASS kernels); one varlen kernel launch per block."""

from __future__ import annotations

import torch

from kvpref.ops.attention.backends.interface import Backend, Needs
from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.ops.attention.splitting import CallLimits

_ALIGNMENT_BYTES = 16
_LSE_ALIGNMENT = 32
"""The kernels keep the log-sum-exp as (pairs, H, longest query rounded up to this many rows)."""
_COUNTERS = 4
"""Words before each tile of the workspace."""
_TILES = {64: (64, 64), 96: (128, 64), 128: (128, 128)}
"""Largest head dim -> rows and columns of the tiles that the backward kernel adds up dq in; compute capability 8.0."""


class Efficient(Backend):
    """fp32, fp16 and bf16 on any CUDA device, no extra package; the fast choice for fp32.

    No GQA: keys and values are copied per query head, unless all query heads share one. The backward kernel is
    called by name, because the autograd formula of the forward one does not take an outside output and log-sum-exp.
    Determinism is the kernel's own rule, which all backends follow: it then does not split keys.
    """

    name = "efficient"
    cost = (
        "grouped keys and values are copied per query head, forward and backward: 2 x keys x heads x head dim numbers"
    )

    def refusal(self, query: torch.Tensor, needs: Needs) -> str | None:
        if query.device.type != "cuda":
            return f"it runs on CUDA tensors only, got device {query.device.type!r}"
        if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it needs float32, float16 or bfloat16, got {query.dtype}"
        multiple = _ALIGNMENT_BYTES // query.dtype.itemsize
        head_dim = needs.head_dim(query)
        if head_dim % multiple:
            return f"it needs a head dim that is a multiple of {multiple} for {query.dtype}, got {head_dim}"
        if query.dtype == torch.bfloat16 and torch.cuda.get_device_capability(query.device) < (8, 0):
            return "it needs compute capability 8.0 or later (Ampere) for bfloat16"
        return None

    def call_limits(self, query: torch.Tensor) -> CallLimits:
        num_heads = query.shape[1]
        return CallLimits(num_heads=num_heads, row_bytes=workspace_bytes(1, num_heads, 128, query.shape[2]) // 128)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, padded_lse, *_ = torch.ops.aten._efficient_attention_forward(
            q.unsqueeze(0),
            _expand_heads(k, q.shape[1]).unsqueeze(0),
            _expand_heads(v, q.shape[1]).unsqueeze(0),
            None,  # bias
            block.cu_seqlens_q,
            block.cu_seqlens_k,
            block.max_seqlen_q,
            block.max_seqlen_k,
            0.0,
            int(block.causal),  # 0: no mask, 1: causal from the top left
            True,  # compute the log-sum-exp
            scale=params.scale,
        )
        lse = _pack_lse(padded_lse, block.cu_seqlens_q, q.shape[0])
        if block.every_pair_meets:
            return out[0], lse
        keyless = _rows_without_partner(block.cu_seqlens_q, block.cu_seqlens_k, q.shape[0])
        # A row without keys divides zero by zero in the kernel.
        return _zero_rows(out[0], keyless), lse.masked_fill(keyless, float("-inf"))

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
        num_heads, num_kv_heads = q.shape[1], k.shape[1]
        unused = torch.empty(0, dtype=torch.int64, device=q.device)  # random-number state, read only with dropout
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            dout.unsqueeze(0),
            q.unsqueeze(0),
            _expand_heads(k, num_heads).unsqueeze(0),
            _expand_heads(v, num_heads).unsqueeze(0),
            None,  # bias
            out.contiguous().unsqueeze(0),
            block.cu_seqlens_q,
            block.cu_seqlens_k,
            block.max_seqlen_q,
            block.max_seqlen_k,
            _pad_lse(lse, block.cu_seqlens_q, block.max_seqlen_q),
            0.0,
            unused,
            unused,
            int(block.causal),
            False,  # no gradient of the bias
            scale=params.scale,
        )
        dk, dv = (grad[0].unflatten(1, (num_kv_heads, -1)).sum(dim=2) for grad in (dk, dv))
        if block.every_pair_meets:
            return dq[0], dk, dv
        # The kernel starts no work for an empty range, so the rows of the other side stay uninitialized.
        keyless = _rows_without_partner(block.cu_seqlens_q, block.cu_seqlens_k, q.shape[0])
        unread = _rows_without_partner(block.cu_seqlens_k, block.cu_seqlens_q, k.shape[0])
        return _zero_rows(dq[0], keyless), _zero_rows(dk, unread), _zero_rows(dv, unread)


def workspace_bytes(num_pairs: int, num_heads: int, longest_query: int, head_dim: int) -> int:
    """Workspace in which the backward kernel adds up dq: fp32 tiles, as many for each pair as for the longest.

    Read from PyTorch's sources (``mem_eff_attention/kernel_backward.h``).
    """
    rows, columns = next((tile for largest, tile in _TILES.items() if head_dim <= largest), (64, 64))
    tiles = -(-longest_query // rows) * -(-head_dim // columns)
    return num_pairs * num_heads * tiles * (rows * columns + _COUNTERS) * 4


def _expand_heads(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(P, G, D) -> (P, H, D), each head H/G times in a row."""
    num_kv_heads = rows.shape[1]
    if num_kv_heads in (1, num_heads):
        return rows.expand(-1, num_heads, -1)  # the kernels take a head stride of zero
    return rows.repeat_interleave(num_heads // num_kv_heads, dim=1)


def _pair_of_rows(cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(num_rows,) int64: the pair that each row belongs to. Nothing here reads a tensor on the host."""
    rows = torch.arange(num_rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, rows, right=True) - 1


def _rows_without_partner(cu_seqlens: torch.Tensor, other: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(num_rows,) bool: rows of `cu_seqlens` whose pair is empty in `other`."""
    return (other.diff() == 0)[_pair_of_rows(cu_seqlens, num_rows)]


def _zero_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return tensor.masked_fill(rows[:, None, None], 0.0)


def _pack_lse(padded: torch.Tensor, cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(pairs, H, longest) -> (H, T)."""
    pair = _pair_of_rows(cu_seqlens, num_rows)
    offset = torch.arange(num_rows, device=cu_seqlens.device) - cu_seqlens[pair]
    return padded[pair, :, offset].T


def _pad_lse(lse: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    """(H, T) -> (pairs, H, longest rounded up), +inf past a pair's end, where probabilities become zero."""
    width = -(-longest // _LSE_ALIGNMENT) * _LSE_ALIGNMENT
    rows = cu_seqlens[:-1, None] + torch.arange(width, dtype=cu_seqlens.dtype, device=lse.device)
    behind = rows >= cu_seqlens[1:, None]
    padded = lse[:, rows.clamp(max=lse.shape[1] - 1)].masked_fill(behind, float("inf"))
    return padded.transpose(0, 1).contiguous()
