"""Cascade attention: every token over its whole path from the root of the prefix tree.

Shape legend: T queries (and own keys) of this pass, P_i keys of source i, H heads, G key/value heads (H a
multiple of G), D head dim of queries and keys, E that of values.
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
        blocks: Which of its queries see which keys; each names the source of its keys.
        params: Scale and softcap of the layer.
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
    sink: torch.Tensor | None = None,
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
        value: (T, G, E), same dtype.
        prefixes: Keys (P_i, G, D) and values (P_i, G, E) of each source other than the pass itself, same dtype.
        plan: Blocks, scale, softcap and backend.
        sink: (H,) an extra logit of every row, whose value is zero (Xiao et al. 2023, arXiv 2309.17453; learned in
            GPT-OSS); any float dtype. It gets a gradient.

    Returns:
        (T, H, E), the dtype of `query`.

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
    _check_tensors(query, pairs, sink)
    for block in blocks:
        _check_rows(query, pairs[block.source], block)
    out, _ = cascade_forward(
        query,
        [key for key, _ in pairs],
        [value for _, value in pairs],
        sink,
        [offsets for block in blocks for offsets in (block.cu_seqlens_q, block.cu_seqlens_k)],
        host_offsets,
        [number for block in blocks for number in block.kind.flat()],
        plan.params.scale,
        plan.params.softcap or 0.0,
        plan.backend,
    )
    return out


def _check_tensors(query: torch.Tensor, pairs: Sequence[KeyValue], sink: torch.Tensor | None) -> None:
    num_heads, head_dim, value_head_dim = query.shape[1], query.shape[2], pairs[0][1].shape[2]
    for source, pair in enumerate(pairs):
        for name, tensor, expected in zip(_names(source), pair, (head_dim, value_head_dim), strict=True):
            if tensor.dtype != query.dtype:
                raise ValueError(f"query and {name} must have one dtype; got {query.dtype} and {tensor.dtype}")
            if tensor.shape[2] != expected or tensor.shape[1] != pair[0].shape[1] or num_heads % tensor.shape[1]:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} does not fit query {tuple(query.shape)} and values of head dim "
                    f"{value_head_dim}: all keys need the query's head dim, all values one, and the number of query "
                    "heads a multiple of the number of key/value heads"
                )
    if sink is not None and (sink.shape != (num_heads,) or not sink.is_floating_point()):
        raise ValueError(f"a sink has one float for each of {num_heads} heads; got {sink.dtype} {tuple(sink.shape)}")


def _check_rows(query: torch.Tensor, pair: KeyValue, block: VarlenBlock) -> None:
    for name, tensor in zip(_names(block.source), pair, strict=True):
        num_rows, expected = tensor.shape[0], block.num_source_rows
        fits = num_rows == expected if block.starts_key is None else num_rows >= expected
        if query.shape[0] != block.num_queries or not fits:
            raise ValueError(
                f"the block of {name} is for {block.num_queries} queries and {expected} keys; "
                f"got {query.shape[0]} and {num_rows}"
            )


def _names(source: int) -> tuple[str, str]:
    """What messages call a source's keys and values."""
    return ("key", "value") if source == 0 else (f"prefix {source - 1}",) * 2
