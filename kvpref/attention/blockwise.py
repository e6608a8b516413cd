"""A layer's attention, block by block: what the operators in `kvpref.attention.ops` do with the backend they chose.

Shape legend: T queries, P_i keys of block i (P_0 = T), H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler

from kvpref.attention.backends.interface import Backend
from kvpref.attention.block import AttentionParams, VarlenBlock
from kvpref.attention.merge import Partial, accumulate, merge_partials
from kvpref.regions import PREFIX

Merge = Callable[[Sequence[Partial], torch.dtype], Partial]


def forward_blocks(
    backend: Backend,
    params: AttentionParams,
    blocks: Sequence[VarlenBlock],
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    merge: Merge = merge_partials,
) -> Partial:
    """Attention of every query (T, H, D) over the keys (P_i, G, D) of all blocks.

    Returns:
        out (T, H, D), the dtype of `query`, and lse (H, T), natural log, fp32 or wider.
    """
    # Autocast would lower the backends' own fp32 arithmetic.
    with torch.autocast(query.device.type, enabled=False):
        partials = []
        for key, value, block in zip(keys, values, blocks, strict=True):
            with _range_of(block):
                partials.append(backend.forward(query, key, value, block, params))
        with _range("merge"):
            out, lse = merge(partials, query.dtype)
            return out.contiguous(), lse.contiguous()


def backward_blocks(
    backend: Backend,
    params: AttentionParams,
    blocks: Sequence[VarlenBlock],
    dout: torch.Tensor,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    merged: Partial,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of `forward_blocks`: each block is handed the `merged` out and lse, as in ring attention.

    Returns:
        dq (T, H, D), and per block dk and dv (P_i, G, D), in the dtypes of query, keys and values.
    """
    dqs, dks, dvs = [], [], []
    with torch.autocast(query.device.type, enabled=False):
        for key, value, block in zip(keys, values, blocks, strict=True):
            with _range_of(block):
                dq, dk, dv = backend.backward(dout, query, key, value, *merged, block, params)
                dqs.append(dq)
                dks.append(dk.to(key.dtype).contiguous())
                dvs.append(dv.to(value.dtype).contiguous())
        with _range("merge"):
            return accumulate(dqs, query.dtype).contiguous(), dks, dvs


def unflatten_blocks(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    cu_seqlens: Sequence[torch.Tensor],
    max_seqlens: Sequence[int],
    block_type: type[VarlenBlock] = VarlenBlock,
) -> list[VarlenBlock]:
    """Blocks from an operator's arguments: per block its query and key offsets, and the longest range of each."""
    return [
        block_type(
            cu_seqlens_q=cu_seqlens[2 * index],
            cu_seqlens_k=cu_seqlens[2 * index + 1],
            max_seqlen_q=max_seqlens[2 * index],
            max_seqlen_k=max_seqlens[2 * index + 1],
            num_queries=query.shape[0],
            num_keys=key.shape[0],
            causal=index == 0,
        )
        for index, key in enumerate(keys)
    ]


def _range_of(block: VarlenBlock) -> AbstractContextManager[object]:
    return _range("self" if block.causal else "cross")


def _range(part: str) -> AbstractContextManager[object]:
    """A name for a part of attention in traces of `torch.profiler`, forward and backward."""
    # Entering a range takes longer than starting a kernel, also while nothing is recorded.
    if not profiler._is_profiler_enabled:
        return nullcontext()
    return profiler.record_function(f"{PREFIX}attention {part}")
