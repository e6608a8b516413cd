"""What a backend is told about a block."""

from __future__ import annotations

import torch

from kvpref.ops.attention import VarlenBlock
from kvpref.prefix.blocks import VarlenLayout


def test_from_layout() -> None:
    layout = VarlenLayout(cu_seqlens_q=(0, 3, 3, 7), cu_seqlens_k=(0, 2, 7, 8), shape="rectangle")
    block = VarlenBlock.from_layout(layout)
    assert block.cu_seqlens_q.tolist() == [0, 3, 3, 7]
    assert block.cu_seqlens_k.tolist() == [0, 2, 7, 8]
    assert block.cu_seqlens_q.dtype == block.cu_seqlens_k.dtype == torch.int32
    assert (block.max_seqlen_q, block.max_seqlen_k) == (4, 5)
    assert not block.causal


def test_pairs_without_queries_are_left_out_for_cpu_kernels() -> None:
    """A zero-length range kills the process inside PyTorch's CPU flash kernel."""
    layout = VarlenLayout(cu_seqlens_q=(0, 3, 3, 7), cu_seqlens_k=(0, 2, 7, 8), shape="rectangle")
    assert VarlenBlock.from_layout(layout).pairs == ((0, 3, 0, 2), (3, 7, 7, 8))
