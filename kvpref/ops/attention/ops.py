"""Cascade attention as PyTorch operators: what torch.compile, FLOP counters and autograd see as one call per layer.

Both operators take their blocks flat, because operators take tensors and numbers only. Shape legend: T queries, P_i
keys of source i (P_0 = T), H heads, G key/value heads, D head dim of queries and keys, E that of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import library
from torch.utils.flop_counter import register_flop_formula

from kvpref.ops.attention.backends import select_backend
from kvpref.ops.attention.backends.interface import Needs
from kvpref.ops.attention.block import AttentionParams
from kvpref.ops.attention.blockwise import backward_blocks, forward_blocks, unflatten_blocks
from kvpref.ops.attention.merge import gradient_of_sink

_BLOCKS_SCHEMA = "Tensor[] cu_seqlens, Tensor[] host_offsets, int[] kinds, float scale, float softcap, str backend"


@library.custom_op(
    "kvpref::cascade_forward",
    mutates_args=(),
    schema=f"(Tensor query, Tensor[] keys, Tensor[] values, Tensor? sink, {_BLOCKS_SCHEMA}) -> (Tensor, Tensor)",
)
def cascade_forward(  # noqa: PLR0913 - an operator takes a block's parts one by one
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    sink: torch.Tensor | None,
    cu_seqlens: Sequence[torch.Tensor],
    host_offsets: Sequence[torch.Tensor],
    kinds: Sequence[int],
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over the keys of all blocks.

    Args:
        query: (T, H, D).
        keys: Per source (P_i, G, D). values: (P_i, G, E).
        sink: (H,) an extra logit of every row, whose value is zero.
        cu_seqlens: The query offsets and the key offsets of each block, int32.
        host_offsets: Per block `VarlenBlock.host_offsets`.
        kinds: Per block three numbers, `BlockKind.flat`.
        scale, softcap: As in `AttentionParams`; a softcap of 0 means none.
        backend: Name of the backend, or ``auto``.

    Returns:
        out (T, H, E), the dtype of `query`, and lse (H, T), natural log, fp32 or wider.
    """
    blocks = unflatten_blocks(cu_seqlens, host_offsets, kinds)
    kernels = select_backend(backend, query, needs_of(values, softcap))
    params = AttentionParams(scale=scale, softcap=softcap or None)
    return forward_blocks(kernels, params, blocks, query, keys, values, sink)


def needs_of(values: Sequence[torch.Tensor], softcap: float) -> Needs:
    """What a call needs from a backend."""
    return Needs(value_head_dim=values[0].shape[2], softcap=softcap > 0)


@library.custom_op(
    "kvpref::cascade_backward",
    mutates_args=(),
    schema=(
        "(Tensor dout, Tensor query, Tensor[] keys, Tensor[] values, Tensor out, Tensor lse, "
        f"{_BLOCKS_SCHEMA}) -> (Tensor, Tensor[], Tensor[])"
    ),
)
def cascade_backward(  # noqa: PLR0913 - an operator takes a block's parts one by one
    dout: torch.Tensor,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: Sequence[torch.Tensor],
    host_offsets: Sequence[torch.Tensor],
    kinds: Sequence[int],
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of `cascade_forward`: each block gets the merged out and lse, as in ring attention.

    Returns:
        dq (T, H, D), and per source dk (P_i, G, D) and dv (P_i, G, E), in the dtypes of query, keys and values.
    """
    kernels = select_backend(backend, query, needs_of(values, softcap))
    params = AttentionParams(scale=scale, softcap=softcap or None)
    blocks = unflatten_blocks(cu_seqlens, host_offsets, kinds)
    return backward_blocks(kernels, params, blocks, dout, query, keys, values, (out, lse))


@cascade_forward.register_fake
def _(
    query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((*query.shape[:2], values[0].shape[2]))
    return out, query.new_empty((query.shape[1], query.shape[0]), dtype=lse_dtype)


@cascade_backward.register_fake
def _(
    dout: torch.Tensor, query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], *args: Any
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    def like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return like(query), [like(key) for key in keys], [like(value) for value in values]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, keys, values, sink, cu_seqlens, host_offsets, *ctx.settings = inputs
    ctx.num_sources = len(keys)
    ctx.num_blocks = len(host_offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, *output, sink, *keys, *values, *host_offsets, *cu_seqlens)


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    # The log-sum-exp leaves the operator for its own backward only; nothing differentiates through it.
    assert dlse is None
    query, out, lse, sink, *rest = ctx.saved_tensors
    keys, values = rest[: ctx.num_sources], rest[ctx.num_sources : 2 * ctx.num_sources]
    offsets = rest[2 * ctx.num_sources :]
    host_offsets, cu_seqlens = offsets[: ctx.num_blocks], offsets[ctx.num_blocks :]
    no_grad = [None] * len(cu_seqlens), [None] * len(host_offsets), *([None] * len(ctx.settings))
    if dout is None:
        none = [None] * ctx.num_sources
        return None, none, none, None, *no_grad
    dq, dks, dvs = cascade_backward(dout, query, keys, values, out, lse, cu_seqlens, host_offsets, *ctx.settings)
    dsink = gradient_of_sink(dout, out, lse, sink) if ctx.needs_input_grad[3] else None
    return dq, dks, dvs, dsink, *no_grad


cascade_forward.register_autograd(_backward, setup_context=_setup_context)


def _count_pairs(query: torch.Tensor, host_offsets: Sequence[torch.Tensor], kinds: Sequence[int]) -> int:
    """Attended query-key pairs over all blocks and heads."""
    blocks = unflatten_blocks([offsets for rows in host_offsets for offsets in rows[:2]], host_offsets, kinds)
    return sum(block.num_attended_pairs for block in blocks) * query.shape[1]


@register_flop_formula(torch.ops.kvpref.cascade_forward, get_raw=True)
def _(query: torch.Tensor, keys: Any, values: Sequence[torch.Tensor], *blocks: Any, **kwargs: Any) -> int:
    """Two products per attended pair: scores and output. Masked pairs are not counted."""
    _, _, host_offsets, kinds, *_ = blocks
    return 2 * (query.shape[2] + values[0].shape[2]) * _count_pairs(query, host_offsets, kinds)


@register_flop_formula(torch.ops.kvpref.cascade_backward, get_raw=True)
def _(
    dout: Any,
    query: torch.Tensor,
    keys: Any,
    values: Sequence[torch.Tensor],
    out: Any,
    lse: Any,
    *blocks: Any,
    **kwargs: Any,
) -> int:
    """Five products per attended pair: scores again, dV, dP, dQ and dK."""
    _, host_offsets, kinds, *_ = blocks
    return 2 * (3 * query.shape[2] + 2 * values[0].shape[2]) * _count_pairs(query, host_offsets, kinds)
