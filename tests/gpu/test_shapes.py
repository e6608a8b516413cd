"""Every kind of block on the kernels of a GPU, against dense attention in float64."""

from __future__ import annotations

import random

import cuda_attention
import pytest
import torch
from attention_errors import relative, tolerance_of
from attention_layouts import SHAPES, attend, counts, layout_with_ranges, self_layout

from kvpref.ops.attention import AttentionParams, CascadePlan, VarlenBlock, cascade_attention, get_backend
from kvpref.ops.attention.backends.interface import Needs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ["cuda_flash", "efficient", "flash_attn", "flash_attn_3", "flash_attn_4", "xformers", "tiled"]
ROWS = (700, 300)
SCALE = 0.2


@pytest.mark.parametrize("head_dims", [(64, 64), (96, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_every_shape(name: str, dtype: torch.dtype, window: int | None, head_dims: tuple[int, int]) -> None:
    check(name, dtype, window, head_dims, None)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3", "tiled"])
def test_softcap(name: str, window: int | None) -> None:
    check(name, torch.bfloat16, window, (64, 64), 2.0)


def check(name: str, dtype: torch.dtype, window: int | None, head_dims: tuple[int, int], softcap: float | None) -> None:
    """Sources of own rows and one prefix, a sink, 8 heads over 2."""
    head_dim, value_head_dim = head_dims
    needs = Needs(value_head_dim=value_head_dim, softcap=softcap is not None)
    query = torch.empty(1, 1, head_dim, dtype=dtype, device="cuda")
    reason = get_backend(name).unsupported_reason(query, needs)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    generator = random.Random(1)
    layouts = [self_layout(generator, ROWS[0], window, longest=300)]
    layouts += [
        layout_with_ranges(generator, shape, ROWS[0], ROWS[source], source, longest=150)
        for shape in SHAPES
        for source in (0, 1)
    ]
    sizes = [(ROWS[0], 8, head_dim), *((rows, 2, dim) for rows in ROWS for dim in head_dims), (8,)]
    leaves = [cuda_attention.random(*size, dtype=dtype, seed=seed).requires_grad_() for seed, size in enumerate(sizes)]
    blocks = tuple(VarlenBlock.from_layout(layout, "cuda") for layout in layouts)
    plan = CascadePlan(blocks=blocks, params=AttentionParams(scale=SCALE, softcap=softcap), backend=name)
    q, k, v, *prefix, sink = leaves
    out = cascade_attention(q, k, v, [(prefix[0], prefix[1])], plan, sink)
    dout = cuda_attention.random(ROWS[0], 8, value_head_dim, dtype=dtype, seed=9)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    q, k, v, *prefix, exact_sink = exact
    truth = attend(q, [(k, v), (prefix[0], prefix[1])], counts(layouts, ROWS).cuda(), SCALE, softcap, exact_sink)
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    expected = [truth, *torch.autograd.grad(truth, exact, dout.double())]
    for result, true_result in zip(found, expected, strict=True):
        assert result.isfinite().all()
        # Eight blocks' shares of a gradient, each rounded by its kernel.
        assert relative(result, true_result) <= 4 * tolerance_of(dtype)
