"""Fake tensors run through the code of the backend that a device would run, whatever the blocks are."""

from __future__ import annotations

import random

import pytest
import torch
from attention_layouts import SHAPES, attend, counts, layout_with_ranges, self_layout
from torch._subclasses import FakeTensorMode

from kvpref.ops.attention import AttentionParams, CascadePlan, VarlenBlock, cascade_attention
from kvpref.profiling.prediction.kernels import running_on


@pytest.mark.thinned(2)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16), ("cuda", torch.float32)]
)
def test_every_kind_of_block_runs_on_fake_tensors(device: str, dtype: torch.dtype, softcap: float | None) -> None:
    """What is kept between calls stays real: afterwards the same blocks compute on real tensors."""
    generator = random.Random(device + str(dtype))
    num_rows = (40, 21)
    layouts = [self_layout(generator, 40, window=5)]
    layouts += [
        layout_with_ranges(generator, shape, 40, num_rows[source], source) for shape in SHAPES for source in (0, 1)
    ]
    params = AttentionParams(scale=0.5, softcap=softcap)
    plan = CascadePlan(blocks=tuple(map(VarlenBlock.from_layout, layouts)), params=params)

    def leaves(dtype: torch.dtype) -> list[torch.Tensor]:
        sizes = [(40, 4, 8), (40, 2, 8), (40, 2, 16), (21, 2, 8), (21, 2, 16), (4,)]
        torch.manual_seed(0)
        return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]

    def run(given: list[torch.Tensor]) -> list[torch.Tensor]:
        query, key, value, *prefix, sink = given
        out = cascade_attention(query, key, value, [(prefix[0], prefix[1])], plan, sink)
        return [out, *torch.autograd.grad(out.sum(), given)]

    seen: list[str] = []
    with FakeTensorMode(allow_non_fake_inputs=True), running_on(device, seen.append):
        given = leaves(dtype)
        found = run(given)
    assert [(item.shape, item.dtype) for item in found[1:]] == [(item.shape, item.dtype) for item in given]
    assert (found[0].shape, found[0].dtype) == ((40, 4, 16), dtype)
    kernels = {(None, "cpu"): "flash_attention_for_cpu", (None, "cuda"): "_attention_backward"}.get(
        (softcap, device), "bmm"
    )
    assert any(kernels in name for name in seen), sorted(set(seen))
    real = leaves(torch.float64)
    query, key, value, *prefix, sink = real
    truth = attend(query, [(key, value), (prefix[0], prefix[1])], counts(layouts, num_rows), 0.5, softcap, sink)
    expected = [truth, *torch.autograd.grad(truth.sum(), real)]
    for one, other in zip(run(real), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)  # float64 sums of at most a hundred terms
