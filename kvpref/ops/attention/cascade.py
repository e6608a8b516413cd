"""Cascade attention: every token over its whole path from the root of the prefix tree.

Shape legend: T queries (and own keys) of this pass, P_i keys of source i, H heads, G key/value heads (H a
multiple of G), D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.ops.attention.ops import cascade_forward

KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class CascadePlan:
    """All blocks of one pass and how to run them.

    Attributes:
        blocks: Which of its queries see which keys; each names the source that its keys are in.
        params: Scale of the layer.
        backend: Name of the backend, or ``auto``.
    """

    blocks: tuple[VarlenBlock, ...]
    params: AttentionParams
    backend: str = "auto"


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
    differentiable log-sum-exp. It cannot be differentiated twice.

    Args:
        query: (T, H, D), any float dtype the backend takes.
        key: (T, G, D), same dtype.
        value: (T, G, D), same dtype.
        prefixes: Keys and values (P_i, G, D) of each source but the pass's own,, same dtype.
        plan: Blocks, scale and backend.

    Returns:
        (T, H, D), the dtype of `query`.

    Raises:
        ValueError: If shapes or dtypes do not fit together, or the backend cannot serve the query.
    """
    pairs = [(key, value), *prefixes]
    blocks = plan.blocks
    num_prefixes = max(block.source for block in blocks)
    if num_prefixes > len(prefixes):
        raise ValueError(f"the plan's blocks read {num_prefixes} prefixes; got {len(prefixes)}")
    host_offsets = [block.host_offsets for block in blocks if block.host_offsets is not None]
    if len(host_offsets) != len(blocks):
        raise ValueError("a plan's blocks need their offsets in host memory; make them with VarlenBlock.from_layout")
    for block in blocks:
        names = ("key", "value") if block.source == 0 else (f"prefix {block.source - 1}",) * 2
        for name, tensor in zip(names, pairs[block.source], strict=True):
            _check_tensor(query, tensor, block, name)
    out, _ = cascade_forward(
        query,
        [key for key, _ in pairs],
        [value for _, value in pairs],
        [offsets for block in blocks for offsets in (block.cu_seqlens_q, block.cu_seqlens_k)],
        host_offsets,
        [number for block in blocks for number in block.kind.flat()],
        plan.params.scale,
        plan.backend,
    )
    return out


def _check_tensor(query: torch.Tensor, tensor: torch.Tensor, block: VarlenBlock, name: str) -> None:
    if tensor.dtype != query.dtype:
        raise ValueError(f"query and {name} must have one dtype; got {query.dtype} and {tensor.dtype}")
    if tensor.shape[-1] != query.shape[-1] or query.shape[1] % tensor.shape[1]:
        raise ValueError(
            f"{name} {tuple(tensor.shape)} does not fit query {tuple(query.shape)}: head dims must be equal and "
            "the number of query heads a multiple of the number of key/value heads"
        )
    if query.shape[0] != block.num_queries or (block.starts_key is None and tensor.shape[0] != block.num_keys):
        raise ValueError(
            f"the block of {name} is for {block.num_queries} queries and {block.num_keys} keys; "
            f"got {query.shape[0]} and {tensor.shape[0]}"
        )
