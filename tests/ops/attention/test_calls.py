"""Blocks that run as several launches give what one launch gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_attention import dense_attention, make_inputs, make_plan, random_tree

from kvpref.ops.attention import AttentionParams, VarlenBlock, calls, cascade_attention, get_backend
from kvpref.ops.attention.backends.cuda_flash import CudaFlash
from kvpref.ops.attention.backends.flash_attn import FlashAttn
from kvpref.ops.attention.backends.interface import Backend
from kvpref.ops.attention.backends.reference import Reference
from kvpref.ops.attention.backends.xformers import Xformers
from kvpref.ops.attention.block import read_offsets
from kvpref.ops.attention.blockwise import backward_blocks, forward_blocks
from kvpref.ops.attention.calls import backward_block, forward_block
from kvpref.ops.attention.merge import Partial, merge_partials
from kvpref.ops.attention.splitting import CallLimits, PairRange
from kvpref.prefix.blocks import VarlenLayout

PARAMS = AttentionParams(scale=0.37)
# float64 sums of at most a hundred terms.
TOLERANCE = 1e-12


class Limited(Reference):
    """The reference with limits, so that its blocks are split; it keeps what it was launched with."""

    def __init__(self) -> None:
        self.launched: list[VarlenBlock] = []

    def call_limits(self, query: torch.Tensor) -> CallLimits:
        return CallLimits(num_heads=1, row_bytes=0)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, *args: Any) -> Any:
        assert (q.shape[0], k.shape[0]) == (v.shape[0] * 0 + block.num_queries, block.num_keys)
        assert min(block.num_queries, block.num_keys) > 0, "kernels refuse empty tensors"
        check_device_offsets(block)
        self.launched.append(block)
        return super().forward(q, k, v, block, *args)

    def backward(self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> Any:
        out, lse, block, _ = args
        # Kernels take the row strides of these from their shapes.
        assert out.is_contiguous()
        assert lse.is_contiguous()
        check_device_offsets(block)
        return super().backward(dout, q, k, v, *args)


def check_device_offsets(block: VarlenBlock) -> None:
    """Kernels read these, the reference those on the host."""
    on_device = torch.stack([block.cu_seqlens_q, block.cu_seqlens_k])
    assert on_device.dtype == torch.int32
    assert on_device.tolist() == read_offsets(block.offsets_key).tolist()
    assert (block.max_seqlen_q, block.max_seqlen_k) == tuple(on_device.diff().amax(dim=1).tolist())
    assert (block.num_queries, block.num_keys) == tuple(on_device[:, -1].tolist())


def cut_at(*places: int) -> Any:
    """In place of `split_pairs`: launches that end at these pairs."""

    def split(offsets_key: bytes, limits: CallLimits) -> tuple[PairRange, ...]:
        num_pairs = len(offsets_key) // 8 - 1
        ends = [place for place in places if place < num_pairs] + [num_pairs]
        return tuple(zip([0, *ends], ends, strict=False))

    return split


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


BLOCKS = {
    "self": ((0, 3, 9, 10, 14), (0, 3, 9, 10, 14), True),
    "cross": ((0, 7, 9, 20, 21), (0, 5, 6, 8, 30), False),
    "a launch without queries": ((0, 7, 7, 20, 21), (0, 5, 6, 8, 30), False),
    "a launch without keys": ((0, 7, 9, 20, 21), (0, 5, 5, 8, 30), False),
}


@pytest.mark.parametrize("places", [(1, 2), (2,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_several_launches_equal_one(name: str, places: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    cu_q, cu_k, causal = BLOCKS[name]
    block = VarlenBlock.from_layout(
        VarlenLayout(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, shape="causal" if causal else "rectangle")
    )
    q, dout = random(cu_q[-1], 4, 8), random(cu_q[-1], 4, 8).flip(0)
    k, v = random(cu_k[-1], 2, 8), random(cu_k[-1], 2, 8).flip(0)
    reference, limited = get_backend("reference"), Limited()
    true_out, true_lse = reference.forward(q, k, v, block, PARAMS)
    monkeypatch.setattr(calls, "split_pairs", cut_at(*places))
    out, lse = forward_block(limited, q, k, v, block, PARAMS)
    torch.testing.assert_close(out, true_out, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(lse, true_lse, rtol=0, atol=TOLERANCE)
    assert len(limited.launched) > 1
    # Merged with a block that every row has seen: other out, finite log-sum-exp; strided, as merges may leave them.
    merged_out = (0.7 * true_out).transpose(0, 1).contiguous().transpose(0, 1)
    merged_lse = torch.logaddexp(true_lse, random(*true_lse.shape))
    truth = reference.backward(dout, q, k, v, merged_out, merged_lse, block, PARAMS)
    found = backward_block(limited, dout, q, k, v, (merged_out, merged_lse), block, PARAMS)
    for grad, true_grad in zip(found, truth, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("depth", [1, 2])
def test_trees_equal_dense_attention(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the operator and autograd, every pair a launch of its own."""
    monkeypatch.setattr(calls, "split_pairs", cut_at(*range(1, 100)))
    monkeypatch.setattr(Reference, "call_limits", Limited.call_limits)
    tree = random_tree(1)
    inputs = make_inputs(tree, depth, 4, 2, 8)
    plan = make_plan(tree, depth, "reference", 0.37)
    out = cascade_attention(inputs.query, inputs.key, inputs.value, inputs.prefixes, plan)
    truth = dense_attention(inputs, tree, depth, 0.37)
    torch.testing.assert_close(out, truth, rtol=0, atol=TOLERANCE)
    weights = random(*out.shape)
    found = torch.autograd.grad(out, inputs.leaves(), weights)
    for grad, true_grad in zip(found, torch.autograd.grad(truth, inputs.leaves(), weights), strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=0, atol=10 * TOLERANCE)


def test_only_the_last_merge_rounds() -> None:
    """In a deep tree, rounding every partial sum would add up."""
    dtypes: list[torch.dtype] = []

    def merge(first: Partial, second: Partial, dtype: torch.dtype) -> Partial:
        dtypes.append(dtype)
        return merge_partials(first, second, dtype)

    layout = VarlenLayout(cu_seqlens_q=(0, 3), cu_seqlens_k=(0, 3), shape="causal")
    blocks = [
        VarlenBlock.from_layout(layout),
        *(VarlenBlock.from_layout(replace(layout, shape="rectangle", source=i)) for i in (1, 2, 3)),
    ]
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        q = random(3, 2, 8).to(dtype)
        out, lse = forward_blocks(Reference(), PARAMS, blocks, q, [q] * 4, [q] * 4, merge=merge)
        assert dtypes == [wide, wide, dtype]
        assert (out.dtype, lse.dtype) == (dtype, wide)
        dtypes.clear()


class Int32Offsets:
    """Replaces a backend's kernels: it computes where pairs start in dq's padded accumulator as they do, in 32 bits."""

    def __init__(self, num_columns: int) -> None:
        self.num_columns, self.num_calls = num_columns, 0

    def backward(self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> Any:
        block = next(item for item in args if isinstance(item, VarlenBlock))
        padding = 128 * torch.arange(len(block.cu_seqlens_q) - 1, dtype=torch.int32)
        starts = (block.cu_seqlens_q[:-1] + padding) * self.num_columns  # int32: wraps around
        assert starts.dtype == torch.int32
        assert (starts.long().diff() > 0).all()
        assert q.shape[0] == block.cu_seqlens_q[-1]
        self.num_calls += 1
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@pytest.mark.parametrize("kind", [CudaFlash, FlashAttn, Xformers])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(32, 128), (64, 128), (32, 80), (8, 256)])
def test_no_pair_starts_where_32_bits_end(
    num_heads: int, head_dim: int, kind: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed sequences of 9000 tokens up to twice the bound; tensors without memory."""
    columns = num_heads * -(-head_dim // 32) * 32
    num_pairs = 2 * 2**31 // columns // 9000
    offsets = tuple(range(0, (num_pairs + 1) * 9000, 9000))
    block = VarlenBlock.from_layout(VarlenLayout(cu_seqlens_q=offsets, cu_seqlens_k=offsets, shape="causal"))
    kernels = Int32Offsets(columns)
    monkeypatch.setattr(kind, "backward", lambda self, *args: kernels.backward(*args))
    q = torch.empty(offsets[-1], num_heads, head_dim, dtype=torch.bfloat16, device="meta")
    k = torch.empty(offsets[-1], 8, head_dim, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(num_heads, offsets[-1], device="meta")
    dq, dk, _ = backward_block(kind(), q, q, k, k, (q, lse), block, PARAMS)
    assert (dq.shape, dk.shape) == (q.shape, k.shape)
    assert kernels.num_calls in (2, 3)
    whole = VarlenBlock.from_layout(VarlenLayout(cu_seqlens_q=offsets, cu_seqlens_k=offsets, shape="causal"))
    with pytest.raises(AssertionError):
        kernels.backward(q, q, k, k, whole)


def test_kernels_start_on_the_device_of_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuTe and Triton take the current device, which is another one for a reference model on the second GPU."""
    entered: list[torch.Tensor] = []
    inside: list[bool] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield
        entered.pop()

    class Watching(Reference):
        def forward(self, q: torch.Tensor, *args: Any) -> Any:
            inside.append(entered == [q])
            return super().forward(q, *args)

        def backward(self, dout: torch.Tensor, q: torch.Tensor, *args: Any) -> Any:
            inside.append(entered == [q])
            return super().backward(dout, q, *args)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    block = VarlenBlock.from_layout(VarlenLayout(cu_seqlens_q=(0, 3), cu_seqlens_k=(0, 3), shape="causal"))
    q = random(3, 2, 8)
    merged = forward_blocks(Watching(), PARAMS, [block], q, [q], [q])
    backward_blocks(Watching(), PARAMS, [block], q, q, [q], [q], merged)
    assert inside == [True, True]
