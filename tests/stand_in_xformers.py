"""A CPU stand-in for `xformers.ops.fmha`, with the signatures and layouts of its FlashAttention operators."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from stand_in_kernels import INF, NAN, Tensor, block_of, compute_forward, rows_without, write_gradients

from kvpref.ops.attention import VarlenBlock


@dataclass
class _SeqLenInfo:
    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]


@dataclass
class BlockDiagonalMask:
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: list[int] | None = None


class BlockDiagonalCausalMask(BlockDiagonalMask):
    pass


class _FlashOp:
    NAME = "fa2@2.5.7-pt"  # PyTorch's own kernels, as where flash-attn is not installed

    @classmethod
    def is_available(cls) -> bool:
        return True


class Xformers:
    """`xformers.ops.fmha` of 0.0.35, its FlashAttention operators."""

    flash = types.SimpleNamespace(FwOp=type("FwOp", (_FlashOp,), {}), BwOp=type("BwOp", (_FlashOp,), {}))
    attn_bias = types.SimpleNamespace(
        _SeqLenInfo=_SeqLenInfo,
        BlockDiagonalMask=BlockDiagonalMask,
        BlockDiagonalCausalMask=BlockDiagonalCausalMask,
    )

    def memory_efficient_attention_partial(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
        output_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert (p, op, output_dtype) == (0.0, self.flash.FwOp, None)
        assert query.ndim == key.ndim == value.ndim == 5
        assert query.shape[0] == key.shape[0] == 1
        assert query.shape[2:] == key.shape[2:] == value.shape[2:]
        # Keys of a group are one tensor when their stride is zero (or the group has one member).
        shared = key.stride(3) == value.stride(3) == 0 or key.shape[3] == 1
        assert shared, "keys are copied"
        q, k, v = query[0].flatten(1, 2), key[0, :, :, 0], value[0, :, :, 0]
        block = self._block(attn_bias, q, k)
        if block.max_seqlen_q == 1 and q.shape[1] > k.shape[1]:
            q.reshape(block.cu_seqlens_q.shape[0] - 1, k.shape[1], -1, q.shape[2])
        out, lse = compute_forward(q, k, v, block, scale)
        lse = lse.masked_fill(lse == -INF, INF)
        return out.reshape(query.shape), lse.unflatten(0, query.shape[2:4]).unsqueeze(0)

    def memory_efficient_attention_backward(
        self,
        grad: Tensor,
        output: Tensor,
        lse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert (p, op) == (0.0, self.flash.BwOp)
        assert query.ndim == key.ndim == value.ndim == 4, "BwOp does not support BMGHK"
        assert query.shape[2:] == key.shape[2:] == value.shape[2:], "BwOp does not support GQA"
        assert lse.shape == (1, query.shape[2], query.shape[1])
        block = self._block(attn_bias, query[0], key[0])
        grads = tuple(torch.full_like(tensor[0], NAN) for tensor in (query, key, value))
        for grad_of_keys in grads[1:]:
            grad_of_keys[rows_without(block.cu_seqlens_k, block.cu_seqlens_q)] = 0.0  # flash_bwd_kernel.h writes these
        grads[0][rows_without(block.cu_seqlens_q, block.cu_seqlens_k)] = 0.0
        write_gradients(grads, (grad[0], query[0], key[0], value[0], output[0], lse[0]), block, scale)
        return tuple(g.unsqueeze(0) for g in grads)

    @staticmethod
    def _block(attn_bias: BlockDiagonalMask, q: Tensor, k: Tensor) -> VarlenBlock:
        queries, keys = attn_bias.q_seqinfo, attn_bias.k_seqinfo
        causal = isinstance(attn_bias, BlockDiagonalCausalMask)
        if causal:
            assert queries.seqstart_py == keys.seqstart_py
        return block_of(queries.seqstart, keys.seqstart, queries.max_seqlen, keys.max_seqlen, causal)
