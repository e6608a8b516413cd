"""The operators as PyTorch sees them: schema, fake kernels, autograd registration, FLOP formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_attention import Inputs, make_inputs, make_plan, random_tree
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from kvpref.ops.attention import CascadePlan, cascade_attention
from kvpref.ops.attention.ops import cascade_backward, cascade_forward

BACKENDS = ("reference", "cpu_flash")


def arguments(inputs: Inputs, plan: CascadePlan) -> tuple[Any, ...]:
    """What `cascade_attention` hands to the operator."""
    blocks = plan.blocks
    pairs = [(inputs.key, inputs.value), *inputs.prefixes]
    return (
        inputs.query,
        [key for key, _ in pairs],
        [value for _, value in pairs],
        [offsets for block in blocks for offsets in (block.cu_seqlens_q, block.cu_seqlens_k)],
        [block.host_offsets for block in blocks],
        [number for block in blocks for number in block.kind.flat()],
        plan.params.scale,
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
        query, keys, values, *rest = given
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
