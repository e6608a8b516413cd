"""The cascade attention op: one autograd Function over all blocks of a layer.

Shape legend: T queries (and own keys) of this pass, P_a keys of ancestor depth a, H heads, G key/value heads (H a
multiple of G), D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kvpref.attention.backends.interface import Backend
from kvpref.attention.block import AttentionParams, VarlenBlock
from kvpref.attention.merge import merge_partials

KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class CascadePlan:
    """All blocks of one pass and how to run them.

    Attributes:
        self_block: Every segment of the pass over itself, causal.
        cross_blocks: One block per ancestor depth, descendants over ancestors, not causal.
        params: Scale of the layer.
        backend: The kernels to use.
    """

    self_block: VarlenBlock
    cross_blocks: tuple[VarlenBlock, ...]
    params: AttentionParams
    backend: Backend


def cascade_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefixes: Sequence[KeyValue],
    plan: CascadePlan,
) -> torch.Tensor:
    """Attention of packed segments over themselves and over the prefixes they continue.

    Equals softmax attention of every token over its whole path from the root of the prefix tree. The prefixes' keys
    and values are read in place: nothing is expanded per response, and their gradients add up inside the kernels.

    The forward pass merges the blocks' partial results by log-sum-exp; the backward pass hands each block the merged
    output and log-sum-exp, as ring attention does (Liu et al. 2023, arXiv 2310.01889), so no kernel needs a
    differentiable log-sum-exp.

    Args:
        query: (T, H, D), any float dtype the backend takes.
        key: (T, G, D), same dtype.
        value: (T, G, D), same dtype.
        prefixes: Per ancestor depth, keys and values (P_a, G, D), same dtype.
        plan: Blocks, scale and backend.

    Returns:
        (T, H, D), the dtype of `query`.

    Raises:
        ValueError: If shapes or dtypes do not fit together, or the backend cannot run a block.
    """
    _check_tensors(query, key, value, prefixes, plan)
    flat = [tensor for pair in prefixes for tensor in pair]
    out: torch.Tensor = _Cascade.apply(query, key, value, plan, *flat)
    return out


def _check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefixes: Sequence[KeyValue], plan: CascadePlan
) -> None:
    if len(prefixes) != len(plan.cross_blocks):
        raise ValueError(f"the plan has {len(plan.cross_blocks)} ancestor depths; got {len(prefixes)} prefixes")
    for name, tensor in (
        ("key", key),
        ("value", value),
        *((f"prefix {i}", t) for i, p in enumerate(prefixes) for t in p),
    ):
        if tensor.dtype != query.dtype:
            raise ValueError(f"query and {name} must have one dtype; got {query.dtype} and {tensor.dtype}")
        if tensor.shape[-1] != query.shape[-1] or query.shape[1] % tensor.shape[1]:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} does not fit query {tuple(query.shape)}: head dims must be equal and "
                "the number of query heads a multiple of the number of key/value heads"
            )
    blocks = (plan.self_block, *plan.cross_blocks)
    for pair, block in zip(((key, value), *prefixes), blocks, strict=True):
        for tensor in pair:
            plan.backend.check(query, tensor, block)


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: CascadePlan,
        *flat_prefixes: torch.Tensor,
    ) -> torch.Tensor:
        backend, params = plan.backend, plan.params
        # Autocast would lower the backends' own fp32 arithmetic.
        with torch.autocast(query.device.type, enabled=False):
            partials = [backend.forward(query, key, value, plan.self_block, params)]
            for depth, block in enumerate(plan.cross_blocks):
                k, v = flat_prefixes[2 * depth : 2 * depth + 2]
                partials.append(backend.forward(query, k, v, block, params))
            out, lse = merge_partials(partials)
            out = out.to(query.dtype)
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, out, lse, *flat_prefixes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse, *flat_prefixes = ctx.saved_tensors
        plan: CascadePlan = ctx.plan
        backend, params, dout = plan.backend, plan.params, grads[0]
        with torch.autocast(query.device.type, enabled=False):
            dq, dk, dv = backend.backward(dout, query, key, value, out, lse, plan.self_block, params)
            dq = dq if dq.dtype == torch.float64 else dq.float()  # the sum over blocks is kept in fp32
            prefix_grads: list[torch.Tensor] = []
            for depth, block in enumerate(plan.cross_blocks):
                k, v = flat_prefixes[2 * depth : 2 * depth + 2]
                dq_block, dk_block, dv_block = backend.backward(dout, query, k, v, out, lse, block, params)
                dq = dq + dq_block
                prefix_grads += [dk_block.to(k.dtype), dv_block.to(v.dtype)]
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, *prefix_grads
