"""A layer's attention, block by block: what the operators in `kvpref.ops.attention.ops` do with the backend they chose.

Shape legend: T queries, P_i keys of source i (P_0 = T), H heads, G key/value heads, D head dim of
queries and keys, E that of values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch.autograd import profiler

from kvpref.ops.attention.backends.interface import Backend
from kvpref.ops.attention.block import AttentionParams, BlockKind, VarlenBlock
from kvpref.ops.attention.calls import backward_block, forward_block
from kvpref.ops.attention.fitting import without_windows
from kvpref.ops.attention.merge import Partial, add_gradient, merge_partials, merge_sink
from kvpref.tracing import PREFIX

Merge = Callable[[Partial, Partial, torch.dtype], Partial]


def forward_blocks(
    backend: Backend,
    params: AttentionParams,
    blocks: Sequence[VarlenBlock],
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    sink: torch.Tensor | None = None,
    merge: Merge = merge_partials,
) -> Partial:
    """Attention of every query (T, H, D) over the keys (P_i, G, D) of all blocks, each block's from its own source.

    A sink (H,) is one extra logit of every row, after all blocks.

    Returns:
        out (T, H, E), the dtype of `query`, and lse (H, T), natural log, fp32 or wider.
    """
    blocks = list(without_windows(blocks, backend.can))
    head_dims = HeadDims.of(backend, query, values)
    query, keys, values = head_dims.pad(query), list(map(head_dims.pad, keys)), list(map(head_dims.pad, values))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    merged: Partial | None = None
    # Autocast would lower the backends' own fp32 arithmetic.
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        for index, block in enumerate(blocks, start=1):
            with _range_of(block):
                partial = forward_block(backend, query, keys[block.source], values[block.source], block, params)
            if merged is None:
                merged = partial
                continue
            # Merged as they come: only two results are held at a time, however deep the tree.
            with _range("merge"):
                is_last = index == len(blocks) and sink is None
                merged = merge(merged, partial, query.dtype if is_last else wide)  # rounded once
        assert merged is not None
        if sink is not None:
            with _range("merge"):
                merged = merge_sink(merged, sink, query.dtype)
        return head_dims.value(merged[0]).to(query.dtype).contiguous(), merged[1].contiguous()


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
    """Gradients of `forward_blocks`: each block gets the `merged` out and lse, as in ring attention.

    Returns:
        dq (T, H, D), and per source dk (P_i, G, D) and dv (P_i, G, E), in the dtypes of query, keys and values.
    """
    blocks = list(without_windows(blocks, backend.can))
    head_dims = HeadDims.of(backend, query, values)
    query, keys, values = head_dims.pad(query), list(map(head_dims.pad, keys)), list(map(head_dims.pad, values))
    dout, merged = head_dims.pad(dout), (head_dims.pad(merged[0]), merged[1])
    dq = _Sum(query, len(blocks))
    readers = Counter(block.source for block in blocks)
    dks = [_Sum(key, readers[source]) for source, key in enumerate(keys)]
    dvs = [_Sum(value, readers[source]) for source, value in enumerate(values)]
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        for block in blocks:
            source = block.source
            with _range_of(block):
                part, dk, dv = backward_block(backend, dout, query, keys[source], values[source], merged, block, params)
            dks[source].add(dk)
            dvs[source].add(dv)
            dq.add(part)
        return (
            head_dims.key(dq.total()),
            [head_dims.key(grad.total()) for grad in dks],
            [head_dims.value(grad.total()) for grad in dvs],
        )


class HeadDims(NamedTuple):
    """The head dims of a call, and the one passed to kernels that take a single one."""

    of_keys: int
    of_values: int
    padded: int | None

    @classmethod
    def of(cls, backend: Backend, query: torch.Tensor, values: Sequence[torch.Tensor]) -> HeadDims:
        of_keys, of_values = query.shape[2], values[0].shape[2]
        is_padded = of_keys != of_values and not backend.can.value_head_dims
        return cls(of_keys, of_values, max(of_keys, of_values) if is_padded else None)

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Pad with zeros, which change neither scores nor the columns that are kept."""
        if self.padded is None or rows.shape[-1] == self.padded:
            return rows
        return torch.nn.functional.pad(rows, (0, self.padded - rows.shape[-1]))

    def key(self, rows: torch.Tensor) -> torch.Tensor:
        """Drop the padding from gradients of queries and keys."""
        return rows[..., : self.of_keys].contiguous()

    def value(self, rows: torch.Tensor) -> torch.Tensor:
        """Drop the padding from outputs and gradients of values."""
        return rows[..., : self.of_values].contiguous()


class _Sum:
    """The gradient of a tensor, summed term by term."""

    def __init__(self, of: torch.Tensor, num_terms: int) -> None:
        self._of, self._left = of, num_terms
        self._sum: torch.Tensor | None = None

    def add(self, grad: torch.Tensor) -> None:
        self._left -= 1
        if self._sum is None:
            self._sum = grad if self._left else self._rounded(grad)
            return
        with _range("merge"):
            self._sum = add_gradient(self._sum, grad, is_last=not self._left)
        if not self._left:
            self._sum = self._rounded(self._sum)

    def total(self) -> torch.Tensor:
        """The sum in the tensor's dtype; zeros if nothing read the tensor."""
        if self._sum is None:
            return torch.zeros_like(self._of, memory_format=torch.contiguous_format)
        return self._sum

    def _rounded(self, grad: torch.Tensor) -> torch.Tensor:
        return grad.to(self._of.dtype).contiguous()


def unflatten_blocks(
    cu_seqlens: Sequence[torch.Tensor], host_offsets: Sequence[torch.Tensor], kinds: Sequence[int]
) -> list[VarlenBlock]:
    """Blocks from an operator's arguments: per block its query and key offsets on the device, and both on the host."""
    return [
        VarlenBlock.from_host(
            offsets, cu_seqlens[2 * index : 2 * index + 2], BlockKind.from_flat(*kinds[3 * index : 3 * index + 3])
        )
        for index, offsets in enumerate(host_offsets)
    ]


def _range_of(block: VarlenBlock) -> AbstractContextManager[object]:
    return _range("cross" if block.source else "self")


def _range(part: str) -> AbstractContextManager[object]:
    """A name for a part of attention in traces of `torch.profiler`, forward and backward."""
    # Entering a range takes longer than starting a kernel, even if nothing is recorded.
    if not profiler._is_profiler_enabled:
        return nullcontext()
    return profiler.record_function(f"{PREFIX}attention {part}")
