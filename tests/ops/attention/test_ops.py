"""The operators as PyTorch sees them: schema, fake kernels, autograd registration, FLOP formulas."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from attention_layouts import SHAPES, counts, layout_with_ranges, self_layout
from dense_attention import Inputs, make_inputs, make_plan, random_tree
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from kvpref.ops.attention import CascadePlan, VarlenBlock, cascade_attention
from kvpref.ops.attention.ops import cascade_backward, cascade_forward

BACKENDS = ("reference", "cpu_flash")


def arguments(inputs: Inputs, plan: CascadePlan, sink: torch.Tensor | None = None) -> tuple[Any, ...]:
    """What `cascade_attention` hands to the operator."""
    blocks = plan.blocks
    pairs = [(inputs.key, inputs.value), *inputs.prefixes]
    return (
        inputs.query,
        [key for key, _ in pairs],
        [value for _, value in pairs],
        sink,
        [offsets for block in blocks for offsets in (block.cu_seqlens_q, block.cu_seqlens_k)],
        [block.host_offsets for block in blocks],
        [number for block in blocks for number in block.kind.flat()],
        plan.params.scale,
        plan.params.softcap or 0.0,
        plan.backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [0, 2])
def test_opcheck(depth: int, dtype: torch.dtype, backend: str) -> None:
    """Shapes, dtypes and strides of the fake kernels, no aliasing, and gradients under AOT dispatch."""
    tree = random_tree(0)
    inputs = make_inputs(tree, depth, 4, 2, 8, dtype)
    given = arguments(inputs, make_plan(tree, depth, backend, 0.5))
    # The log-sum-exp output has no gradient, which the dynamic check would ask for.
    library.opcheck(cascade_forward, given, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    with torch.no_grad():
        out, lse = cascade_forward(*given)
        query, keys, values, _, *rest = given
        library.opcheck(
            cascade_backward,
            (torch.ones_like(out), query.detach(), [key.detach() for key in keys], values, out, lse, *rest),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_flop_counters_count_the_pairs_that_attend(depth: int) -> None:
    tree, head_dim, num_heads = random_tree(1), 8, 4
    inputs, plan = make_inputs(tree, depth, num_heads, 2, head_dim), make_plan(tree, depth, "cpu_flash", 0.5)
    with FlopCounterMode(display=False) as counter:
        out = cascade_attention(inputs.query, inputs.key, inputs.value, inputs.prefixes, plan)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    backward = counter.get_total_flops()
    num_pairs = 0
    for block in plan.blocks:
        for q0, q1, k0, k1 in block.pairs:
            sees = torch.ones(q1 - q0, k1 - k0).tril() if block.causal else torch.ones(q1 - q0, k1 - k0)
            num_pairs += int(sees.sum())
    # One multiply-add is two FLOPs; two products forward and five backward.
    assert forward == 2 * 2 * num_pairs * num_heads * head_dim
    assert backward == 5 * 2 * num_pairs * num_heads * head_dim


def windowed_call(backend: str, softcap: float = 0.0) -> tuple[tuple[Any, ...], int]:
    """Arguments of a call with every kind of block, values of another head dim and a sink; and its attended pairs."""
    generator = random.Random(3)
    layouts = [
        self_layout(generator, 30, window=4),
        *(layout_with_ranges(generator, shape, 30, 20, source=1) for shape in SHAPES),
    ]
    blocks = [VarlenBlock.from_layout(layout) for layout in layouts]

    def rows(count: int, heads: int, head_dim: int) -> torch.Tensor:
        return torch.randn(count, heads, head_dim, dtype=torch.float64, requires_grad=True)

    query, keys, values = rows(30, 4, 8), [rows(count, 2, 8) for count in (30, 20)], [rows(n, 2, 6) for n in (30, 20)]
    flat = [number for block in blocks for number in block.kind.flat()]
    cu_seqlens = [offsets for block in blocks for offsets in (block.cu_seqlens_q, block.cu_seqlens_k)]
    offsets = [block.host_offsets for block in blocks]
    given = (query, keys, values, rows(4, 1, 1).flatten(), cu_seqlens, offsets, flat, 0.5, softcap, backend)
    return given, int(counts(layouts, (30, 20)).sum())


@pytest.mark.parametrize(("backend", "softcap"), [("tiled", 3.0), ("cpu_flash", 0.0), ("reference", 0.0)])
def test_opcheck_of_every_kind_of_block(backend: str, softcap: float) -> None:
    given, _ = windowed_call(backend, softcap)
    library.opcheck(cascade_forward, given, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    with torch.no_grad():
        out, lse = cascade_forward(*given)
        query, keys, values, _, *rest = given
        given = (torch.ones_like(out), query, keys, values, out, lse, *rest)
        library.opcheck(cascade_backward, given, test_utils=("test_schema", "test_faketensor"))


def test_flops_of_every_kind_of_block() -> None:
    """Scores have 8 columns and values 6: products of queries, keys and their gradients, and of values and theirs."""
    given, num_pairs = windowed_call("cpu_flash")
    with FlopCounterMode(display=False) as counter:
        out, _ = cascade_forward(*given)
    assert counter.get_total_flops() == 2 * num_pairs * 4 * (8 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * num_pairs * 4 * (3 * 8 + 2 * 6)


def test_compiled_with_a_sink_and_windows() -> None:
    """One graph, without a break, with the same bits."""
    given, _ = windowed_call("cpu_flash")
    query, keys, values, sink, *rest = given
    leaves = [query, *keys, *values, sink]

    def run(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], sink: torch.Tensor) -> Any:
        return cascade_forward(query * 1.5, keys, values, sink, *rest)[0].square()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    outs = [function(query, keys, values, sink) for function in (run, compiled)]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out.sum(), leaves) for out in outs]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
