"""The backends whose kernels need a GPU, on stand-ins for those kernels: results, layouts and every gradient."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import stand_in_efficient
import torch
from dense_attention import Inputs, dense_attention, make_inputs, make_plan, random_tree
from stand_in_backends import STAND_INS, running_on_stand_in

from kvpref.ops.attention import AttentionParams, VarlenBlock, cascade_attention, get_backend
from kvpref.prefix.blocks import VarlenLayout

PARAMS = AttentionParams(scale=0.37)
# float64 sums of at most a hundred terms.
TOLERANCE = 1e-12
INF = float("inf")


@pytest.fixture(params=[name for name in STAND_INS if name != "cuda_flash"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend that runs on its stand-in and takes CPU tensors."""
    with running_on_stand_in(request.param, monkeypatch) as name:
        yield name


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that a row nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


BLOCKS = {
    "self": ((0, 3, 9, 10), (0, 3, 9, 10), True),
    "one pair": ((0, 7), (0, 5), False),
    "long pairs": ((0, 40, 73), (0, 3, 60), False),
    "first without queries": ((0, 0, 10), (0, 4, 9), False),
    "middle without queries": ((0, 3, 3, 10), (0, 5, 9, 12), False),
    "last without queries": ((0, 10, 10), (0, 4, 9), False),
    "single queries": ((0, 1, 1, 2), (0, 5, 9, 12), False),
    "without keys": ((0, 2, 5, 6), (0, 0, 3, 7), False),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["all heads", "grouped", "one head"])
@pytest.mark.parametrize("block_name", BLOCKS)
def test_blocks_equal_the_reference(block_name: str, heads: tuple[int, int], backend: str) -> None:
    cu_q, cu_k, causal = BLOCKS[block_name]
    block = VarlenBlock.from_layout(
        VarlenLayout(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, shape="causal" if causal else "rectangle")
    )
    q, dout = random(cu_q[-1], heads[0], 8), random(cu_q[-1], heads[0], 8).flip(0)
    k, v = random(cu_k[-1], heads[1], 8), random(cu_k[-1], heads[1], 8).flip(0)
    true_out, true_lse = get_backend("reference").forward(q, k, v, block, PARAMS)
    out, lse = get_backend(backend).forward(q, k, v, block, PARAMS)
    torch.testing.assert_close(out, true_out, rtol=0, atol=TOLERANCE)
    # A row without keys: -inf, or +inf.
    torch.testing.assert_close(lse.where(lse.isfinite(), -INF), true_lse, rtol=0, atol=TOLERANCE)
    # Merged with a block that every row has seen: other out, finite log-sum-exp.
    merged_out = (0.7 * true_out).transpose(0, 1).contiguous().transpose(0, 1)
    merged_lse = torch.logaddexp(true_lse, random(*true_lse.shape))
    merged = (dout, q, k, v, merged_out, merged_lse, block, PARAMS)
    truth = get_backend("reference").backward(*merged)
    for grad, true_grad in zip(get_backend(backend).backward(*merged), truth, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("heads", [(4, 2), (4, 1)], ids=["grouped", "one head"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_trees_equal_dense_attention(depth: int, heads: tuple[int, int], backend: str) -> None:
    """Several blocks merged, through autograd, from strided inputs and a gradient with strides of zero."""
    tree = random_tree(1)
    plain = make_inputs(tree, depth, *heads, 8)

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()

    inputs = Inputs(*map(strided, plain[:3]), [(strided(k), strided(v)) for k, v in plain.prefixes])
    plan = make_plan(tree, depth, backend, 0.37)
    out = cascade_attention(inputs.query, inputs.key, inputs.value, inputs.prefixes, plan)
    truth = dense_attention(plain, tree, depth, 0.37)
    torch.testing.assert_close(out, truth, rtol=0, atol=TOLERANCE)
    for weights in (random(*out.shape), torch.ones(1, dtype=torch.float64).expand(out.shape)):
        found = torch.autograd.grad(out, inputs.leaves(), weights, retain_graph=True)
        true_grads = torch.autograd.grad(truth, plain.leaves(), weights, retain_graph=True)
        for grad, true_grad in zip(found, true_grads, strict=True):
            torch.testing.assert_close(grad, true_grad, rtol=0, atol=10 * TOLERANCE)


def schema_of(operator: Any) -> list[tuple[str, bool]]:
    return [(argument.name, argument.kwarg_only) for argument in operator.default._schema.arguments]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_stand_ins_have_the_operators_signature(direction: str) -> None:
    stand_in = getattr(stand_in_efficient, f"efficient_attention_{direction}")
    found = [(p.name, p.kind is p.KEYWORD_ONLY) for p in inspect.signature(stand_in).parameters.values()]
    assert found == schema_of(getattr(torch.ops.aten, f"_efficient_attention_{direction}"))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_pytorch_takes_the_forward_call(num_kv_heads: int) -> None:
    """The real operator, on meta tensors: PyTorch checks the arguments and gives the padded log-sum-exp's shape.

    The backward operator has no meta kernel that takes its own arguments (torch 2.13), so its call is bound to the
    schema only, above.
    """
    layout = VarlenLayout(cu_seqlens_q=(0, 3, 3, 40), cu_seqlens_k=(0, 5, 9, 12), shape="rectangle")
    query, key = (torch.empty(rows, heads, 8, device="meta") for rows, heads in ((40, 4), (12, num_kv_heads)))
    out, lse = get_backend("efficient").forward(query, key, key, VarlenBlock.from_layout(layout, "meta"), PARAMS)
    assert out.shape == (40, 4, 8)
    assert (lse.shape, lse.dtype) == ((4, 40), torch.float32)
