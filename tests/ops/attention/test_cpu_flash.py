"""`cpu_flash` where it batches short segments: the numbers of one call per segment, in fewer calls."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch

from kvpref.ops.attention import AttentionParams, VarlenBlock, get_backend
from kvpref.ops.attention.backends import cpu_flash
from kvpref.prefix.blocks import VarlenLayout

PARAMS = AttentionParams(scale=0.4)
LENGTHS = {
    "equal": [5] * 12,
    "one token each": [1] * 9,
    "of like length": [12, 13, 9, 14, 11, 10, 13, 12, 9, 14],
    "short and long": [3, 40, 1, 7, 2, 21, 8, 1, 4, 6, 2, 5, 90, 3],
    "with empty ones": [0, 4, 0, 3, 2, 5, 1, 6, 4, 0, 2, 7, 0],
    "too few": [3, 4, 5],
}


def make_block(lengths: list[int]) -> VarlenBlock:
    offsets = (0, *accumulate(lengths))
    return VarlenBlock.from_layout(VarlenLayout(cu_seqlens_q=offsets, cu_seqlens_k=offsets, shape="causal"))


def make_tensors(block: VarlenBlock, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(block.num_queries, heads, 8) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("name", LENGTHS)
def test_equals_the_reference(name: str) -> None:
    block = make_block(LENGTHS[name])
    query, key, value, dout = make_tensors(block)
    reference, kernels = get_backend("reference"), get_backend("cpu_flash")
    out, lse = reference.forward(query, key, value, block, PARAMS)
    found, found_lse = kernels.forward(query, key, value, block, PARAMS)
    # float64 sums of at most a hundred terms
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_lse, lse, rtol=1e-12, atol=1e-12)
    # A merged log-sum-exp, as if a prefix had taken part.
    merged, merged_out = torch.logaddexp(lse, torch.ones_like(lse)), 0.7 * out
    truth = reference.backward(dout, query, key, value, merged_out, merged, block, PARAMS)
    grads = kernels.backward(dout, query, key, value, merged_out, merged, block, PARAMS)
    for grad, true_grad in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=1e-12, atol=1e-12)


def test_segments_do_not_leak_into_one_another() -> None:
    """Other numbers in one segment leave the others bitwise equal, and NaN stays where it is."""
    lengths = LENGTHS["of like length"]
    block = make_block(lengths)
    tensors = make_tensors(block)
    rows = slice(sum(lengths[:4]), sum(lengths[:5]))
    others = torch.ones(block.num_queries, dtype=torch.bool)
    others[rows] = False
    kernels = get_backend("cpu_flash")

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
        out, lse = kernels.forward(query, key, value, block, PARAMS)
        return [out, lse.T, *kernels.backward(dout, query, key, value, out, lse, block, PARAMS)]

    before = run(*tensors)
    for wrong in (3.0, float("nan")):
        for tensor in tensors:
            tensor[rows] = wrong
        after = run(*tensors)
        assert all(torch.equal(a[others], b[others]) for a, b in zip(before, after, strict=True))


def test_every_row_is_in_one_call_and_short_ones_share_it() -> None:
    generator = random.Random(0)
    for _ in range(50):
        lengths = [generator.choice([0, 1, 2, 5, 9, 17, 20, 21, 60]) for _ in range(generator.randint(1, 60))]
        calls = cpu_flash._calls(make_block(lengths).pairs, "causal")
        rows: list[int] = []
        for queries, keys in calls:
            assert queries is keys or (isinstance(queries, cpu_flash._Run) and queries == keys), "no second bucket"
            if isinstance(queries, cpu_flash._Run):
                rows += range(queries.start, queries.end)
            else:
                assert len(queries.places) >= 8
                rows += queries.places.flatten()[queries.own].tolist()
        assert sorted(rows) == list(range(sum(lengths)))
    assert len(cpu_flash._calls(make_block([4] * 100).pairs, "causal")) == 1
    # Not causal: padded keys would be seen.
    assert len(cpu_flash._calls(make_block([4] * 100).pairs, "rectangle")) == 100
