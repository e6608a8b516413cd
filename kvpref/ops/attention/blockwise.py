"""A layer's attention, block by block: what the operators in `kvpref.ops.attention.ops` do with the backend they chose.

Shape legend: T queries, P_i keys of block i (P_0 = T), H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler

from kvpref.ops.attention.backends.interface import Backend
from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.ops.attention.calls import backward_block, forward_block
from kvpref.ops.attention.merge import Partial, add_gradient, merge_partials
from kvpref.tracing import PREFIX

Merge = Callable[[Partial, Partial, torch.dtype], Partial]


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
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    merged: Partial | None = None
    # Autocast would lower the backends' own fp32 arithmetic.
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        for index, (key, value, block) in enumerate(zip(keys, values, blocks, strict=True), start=1):
            with _range_of(block):
                partial = forward_block(backend, query, key, value, block, params)
            if merged is None:
                merged = partial
                continue
            # Merged as they come: two results are held at a time, however deep the tree.
            with _range("merge"):
                merged = merge(merged, partial, query.dtype if index == len(blocks) else wide)  # rounded once
        assert merged is not None
        return merged[0].to(query.dtype).contiguous(), merged[1].contiguous()


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
    dq: torch.Tensor | None = None
    dks, dvs = [], []
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        for index, (key, value, block) in enumerate(zip(keys, values, blocks, strict=True), start=1):
            with _range_of(block):
                part, dk, dv = backward_block(backend, dout, query, key, value, merged, block, params)
                dks.append(dk.to(key.dtype).contiguous())
                dvs.append(dv.to(value.dtype).contiguous())
            if dq is None:
                dq = part
                continue
            with _range("merge"):
                dq = add_gradient(dq, part, is_last=index == len(blocks))
        assert dq is not None
        return dq.to(query.dtype).contiguous(), dks, dvs


def unflatten_blocks(cu_seqlens: Sequence[torch.Tensor], host_offsets: Sequence[torch.Tensor]) -> list[VarlenBlock]:
    """Blocks from an operator's arguments: per block its query and key offsets on the device, and both on the host."""
    return [
        VarlenBlock.from_offsets(offsets.numpy().tobytes(), cu_seqlens[2 * index : 2 * index + 2], causal=index == 0)
        for index, offsets in enumerate(host_offsets)
    ]


def _range_of(block: VarlenBlock) -> AbstractContextManager[object]:
    return _range("self" if block.causal else "cross")


def _range(part: str) -> AbstractContextManager[object]:
    """A name for a part of attention in traces of `torch.profiler`, forward and backward."""
    # Entering a range takes longer than starting a kernel, also while nothing is recorded.
    if not profiler._is_profiler_enabled:
        return nullcontext()
    return profiler.record_function(f"{PREFIX}attention {part}")
