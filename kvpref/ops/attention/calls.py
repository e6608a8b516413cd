"""A block as kernel launches: usually one, or several over consecutive pairs where `splitting` says so.

Shape legend: T queries, P keys, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kvpref.ops.attention.backends.interface import Backend
from kvpref.ops.attention.block import AttentionParams, VarlenBlock, read_offsets
from kvpref.ops.attention.fitting import fit
from kvpref.ops.attention.splitting import split_pairs
from kvpref.ops.attention.spreading import spread_backward

Partial = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Call(NamedTuple):
    """One launch: its pairs as a block of their own, and the rows of the whole that they read and write."""

    block: VarlenBlock
    queries: slice
    keys: slice

    @property
    def is_empty(self) -> bool:
        """Whether no query meets a key, so that there is nothing to launch."""
        return self.block.num_queries == 0 or self.block.num_keys == 0


def forward_block(
    backend: Backend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block: VarlenBlock,
    params: AttentionParams,
) -> Partial:
    """`Backend.forward` of a block in the backend's form, in as many launches as the backend's limits require."""
    fitted = fit(block, backend.can)
    query, key, value = fitted.queries(query), fitted.keys(key), fitted.keys(value)
    out, lse = _forward_launches(backend, query, key, value, fitted.block, params)
    return fitted.queries(out), fitted.queries(lse, dim=1)


def _forward_launches(
    backend: Backend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block: VarlenBlock,
    params: AttentionParams,
) -> Partial:
    calls = _calls(backend, query, block)
    if len(calls) == 1:
        return backend.forward(query, key, value, block, params)
    partials = [
        _without_keys(query[call.queries], value.shape[2])
        if call.is_empty
        else backend.forward(query[call.queries], key[call.keys], value[call.keys], call.block, params)
        for call in calls
    ]
    return torch.cat([out for out, _ in partials]), torch.cat([lse for _, lse in partials], dim=1)


def backward_block(
    backend: Backend,
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    merged: Partial,
    block: VarlenBlock,
    params: AttentionParams,
) -> Gradients:
    """`Backend.backward` of a block, split in the same way."""
    fitted, (out, lse) = fit(block, backend.can), merged
    num_rows = key.shape[0]
    dq, dk, dv = _backward_launches(
        backend,
        fitted.queries(dout),
        fitted.queries(query),
        fitted.keys(key),
        fitted.keys(value),
        (fitted.queries(out), fitted.queries(lse, dim=1)),
        fitted.block,
        params,
    )
    return fitted.queries(dq), fitted.gradient_of_keys(dk, num_rows), fitted.gradient_of_keys(dv, num_rows)


def _backward_launches(
    backend: Backend,
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    merged: Partial,
    block: VarlenBlock,
    params: AttentionParams,
) -> Gradients:
    """No two launches write the same row."""
    calls, (out, lse) = _calls(backend, query, block), merged
    if len(calls) == 1:
        return spread_backward(backend, dout, query, key, value, merged, block, params)
    parts: list[Gradients] = []
    for call in calls:
        rows, q, k, v = call.queries, query[call.queries], key[call.keys], value[call.keys]
        if call.is_empty:
            parts.append((torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)))
        else:
            # The kernels derive the row strides of the output and of the log-sum-exp from the output's shape.
            part = (out[rows].contiguous(), lse[:, rows].contiguous())
            parts.append(spread_backward(backend, dout[rows], q, k, v, part, call.block, params))
    dq, dk, dv = (torch.cat(grads) for grads in zip(*parts, strict=True))
    return dq, dk, dv


def _without_keys(query: torch.Tensor, value_head_dim: int) -> Partial:
    """The result for queries that see no key here."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros((*query.shape[:2], value_head_dim))
    return out, query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=dtype)


def _calls(backend: Backend, query: torch.Tensor, block: VarlenBlock) -> list[_Call]:
    limits = backend.call_limits(query)
    if limits is None:
        return [_whole(block)]
    ranges = split_pairs(block.offsets_key, limits)
    return [_whole(block)] if len(ranges) == 1 else list(_cut(block, ranges))


def _whole(block: VarlenBlock) -> _Call:
    return _Call(block, slice(0, block.num_queries), slice(0, block.num_keys))


def _cut(block: VarlenBlock, ranges: tuple[tuple[int, int], ...]) -> Iterator[_Call]:
    for start, stop in ranges:
        offsets = read_offsets(block.offsets_key)[:, start : stop + 1]
        (q_start, q_stop), (k_start, k_stop) = offsets[:, [0, -1]].tolist()
        part = VarlenBlock.from_offsets(
            (offsets - offsets[:, :1]).tobytes(),
            # On the device, without a copy from the host.
            (block.cu_seqlens_q[start : stop + 1] - q_start, block.cu_seqlens_k[start : stop + 1] - k_start),
            block.kind,
        )
        yield _Call(part, slice(q_start, q_stop), slice(k_start, k_stop))
