"""What the CPU stand-ins for kernels share.

A stand-in has the signature of the real function, recorded from its source, computes with the `reference` backend, and
returns what the real one does: its layout of the log-sum-exp, its mark for rows without keys, and NaN where it leaves
memory as the allocator gave it. So an argument in the wrong place, a layout or a missing normalisation shows.
"""

from __future__ import annotations

import types
from dataclasses import replace
from itertools import pairwise

import torch

from kvpref.ops.attention import AttentionParams, VarlenBlock, get_backend
from kvpref.ops.attention.block import BlockKind

Tensor = torch.Tensor
NAN, INF = float("nan"), float("inf")


def module_like(kernels: object) -> types.ModuleType:
    """An importable module with the functions of a stand-in."""
    module = types.ModuleType("stand_in")
    for name in dir(kernels):
        if not name.startswith("__"):
            setattr(module, name, getattr(kernels, name))
    return module


def block_of(
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, window: tuple[int, int] = (-1, -1)
) -> VarlenBlock:
    """The block that the arguments describe, after the checks that the kernels make.

    A window is (keys to the left, keys to the right), -1 for all, as FlashAttention has it; a causal mask sets the
    right side to 0 (`set_params_fprop`).
    """
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q >= cu_q.diff().max()
    assert max_k >= cu_k.diff().max()
    assert isinstance(causal, bool | int)
    left, right = (window[0], 0) if causal else window
    shape = {(-1, -1): "rectangle", (0, -1): "anti_causal"}.get((left, right), "causal")
    assert shape != "causal" or right == 0
    kind = BlockKind(shape=shape, window=left + 1 if shape == "causal" and left >= 0 else None)
    block = VarlenBlock.from_offsets(torch.stack([cu_q, cu_k]).numpy().tobytes(), (cu_q, cu_k), kind)
    if shape != "rectangle":
        # Some kernels align masks to the top left, others to the bottom right.
        assert all(q1 - q0 == k1 - k0 for q0, q1, k0, k1 in block.pairs), "not square"
    return replace(block, max_seqlen_q=max_q, max_seqlen_k=max_k)


def compute_forward(
    q: Tensor, k: Tensor, v: Tensor, block: VarlenBlock, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    assert q.shape[2] == k.shape[2] == v.shape[2], "kernels take one head dim"
    return get_backend("reference").forward(q, k, v, block, AttentionParams(scale=scale, softcap=softcap or None))


def write_gradients(
    targets: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    block: VarlenBlock,
    scale: float,
    softcap: float = 0.0,
) -> None:
    """Write only the rows of pairs that have queries and keys; inputs are dout, q, k, v, out, lse."""
    grads = get_backend("reference").backward(*inputs, block, AttentionParams(scale=scale, softcap=softcap or None))
    for q0, q1, k0, k1 in block.pairs:
        for target, grad, rows in zip(targets, grads, (slice(q0, q1), slice(k0, k1), slice(k0, k1)), strict=True):
            assert target.shape == grad.shape
            target[rows] = grad[rows]


def rows_without(cu_seqlens: Tensor, other: Tensor) -> list[int]:
    """Rows whose pair is empty on the other side."""
    spans = zip(pairwise(cu_seqlens.tolist()), pairwise(other.tolist()), strict=True)
    return [row for (start, end), (first, last) in spans if first == last for row in range(start, end)]
