"""What every CUDA attention backend must satisfy, against float64 on the same numbers."""

from __future__ import annotations

import pytest
import torch
from attention_errors import errors_beside_naive, leaves_to, plan_to, relative, tolerance_of
from dense_attention import Inputs, dense_attention, make_inputs, make_plan, random_tree

from kvpref.ops.attention import AttentionParams, VarlenBlock, cascade_attention, get_backend
from kvpref.prefix.blocks import VarlenLayout

PARAMS = AttentionParams(scale=0.25)
BLOCKS = {
    "self": ((0, 3, 9, 10), (0, 3, 9, 10), True),
    "long self": ((0, 200, 457), (0, 200, 457), True),
    "pair without queries": ((0, 3, 3, 10), (0, 5, 9, 200), False),
    "first without queries": ((0, 0, 10), (0, 300, 310), False),
    "last without queries": ((0, 10, 10), (0, 300, 310), False),
    "single queries": ((0, 1, 1, 2), (0, 5, 9, 120), False),
    "many pairs": (tuple(range(0, 330, 3)), tuple(range(0, 770, 7)), False),
}
HEADS = [(8, 8), (8, 2), (4, 1)]


def skip_unless_it_runs(name: str, dtype: torch.dtype, head_dim: int = 64) -> None:
    """Skip with the backend's own reason: no package, an older GPU."""
    reason = get_backend(name).unsupported_reason(torch.empty(1, 1, head_dim, dtype=dtype, device="cuda"))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def block_of(q: tuple[int, ...], k: tuple[int, ...], causal: bool = False) -> VarlenBlock:
    return VarlenBlock.from_layout(
        VarlenLayout(cu_seqlens_q=q, cu_seqlens_k=k, shape="causal" if causal else "rectangle"), "cuda"
    )


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to("cuda", dtype)


def check_block(name: str, block_name: str, heads: tuple[int, int], dtype: torch.dtype, head_dim: int = 64) -> None:
    skip_unless_it_runs(name, dtype, head_dim)
    cu_q, cu_k, causal = BLOCKS[block_name]
    query, dout = (random(cu_q[-1], heads[0], head_dim, dtype=dtype, seed=seed) for seed in (0, 1))
    key, value = (random(cu_k[-1], heads[1], head_dim, dtype=dtype, seed=seed) for seed in (2, 3))
    block, kernels, reference = block_of(cu_q, cu_k, causal), get_backend(name), get_backend("reference")
    exact = [tensor.double() for tensor in (query, key, value)]
    true_out, true_lse = reference.forward(*exact, block, PARAMS)
    out, lse = kernels.forward(query, key, value, block, PARAMS)
    assert relative(out, true_out) <= tolerance_of(dtype)
    assert lse.shape == true_lse.shape
    assert lse.dtype == torch.float32
    assert relative(lse, true_lse) <= tolerance_of(dtype)
    found = kernels.backward(dout, query, key, value, out, lse, block, PARAMS)
    truth = reference.backward(dout.double(), *exact, true_out, true_lse, block, PARAMS)
    for grad, true_grad in zip(found, truth, strict=True):
        assert grad.isfinite().all()
        assert relative(grad, true_grad) <= tolerance_of(dtype)


def check_keys_without_queries(name: str, dtype: torch.dtype) -> None:
    """Nobody reads them, so their rows must be zeros, not what the allocator left there."""
    skip_unless_it_runs(name, dtype)
    query, key = random(6, 4, 64, dtype=dtype), random(500, 2, 64, dtype=dtype, seed=1)
    block = block_of((0, 6, 6), (0, 10, 500))
    for heads in (2, 4):
        garbage = torch.full((4 * 500, heads, 64), float("nan"), device="cuda", dtype=dtype)
        del garbage
        out, lse = get_backend(name).forward(query, key, key, block, PARAMS)
        _, dk, dv = get_backend(name).backward(query, query, key, key, out, lse, block, PARAMS)
        assert dk[10:].count_nonzero() == 0
        assert dv[10:].count_nonzero() == 0


def check_rows_without_keys(name: str, dtype: torch.dtype) -> None:
    skip_unless_it_runs(name, dtype)
    query, key = random(5, 4, 64, dtype=dtype), random(3, 4, 64, dtype=dtype, seed=1)
    block = block_of((0, 2, 5), (0, 0, 3))
    out, lse = get_backend(name).forward(query, key, key, block, PARAMS)
    assert lse[:, :2].isinf().all()
    assert lse[:, 2:].isfinite().all()
    assert out[:2].count_nonzero() == 0
    merged = torch.logaddexp(lse.where(lse.isfinite(), float("-inf")), torch.zeros_like(lse))
    dq, _, _ = get_backend(name).backward(query, query, key, key, out, merged, block, PARAMS)
    assert dq[:2].count_nonzero() == 0


def check_determinism(name: str, dtype: torch.dtype, head_dim: int = 64) -> None:
    """The same bits again where sums go over several key blocks: kernels work on 64 to 128 keys at a time."""
    torch.use_deterministic_algorithms(True)
    try:
        skip_unless_it_runs(name, dtype, head_dim)
        for cu_q, cu_k, causal in (
            ((0, 700, 1500), (0, 700, 1500), True),
            ((0, 900, 900, 1500), (0, 1300, 1310, 2600), False),
        ):
            query, dout = (random(cu_q[-1], 8, head_dim, dtype=dtype, seed=seed) for seed in (0, 1))
            key, value = (random(cu_k[-1], 2, head_dim, dtype=dtype, seed=seed) for seed in (2, 3))
            block, kernels = block_of(cu_q, cu_k, causal), get_backend(name)
            out, lse = kernels.forward(query, key, value, block, PARAMS)
            first = kernels.backward(dout, query, key, value, out, lse, block, PARAMS)
            for _ in range(5):
                again = kernels.forward(query, key, value, block, PARAMS)
                assert all(torch.equal(one, other) for one, other in zip((out, lse), again, strict=True))
                grads = kernels.backward(dout, query, key, value, out, lse, block, PARAMS)
                assert all(torch.equal(one, other) for one, other in zip(first, grads, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def check_tree(name: str, depth: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """The cascade, through autograd; dense attention in the same dtype on the CPU sets the scale of rounding."""
    skip_unless_it_runs(name, dtype, head_dim)
    tree, scale = random_tree(1), head_dim**-0.5
    narrow = leaves_to(make_inputs(tree, depth, *heads, head_dim), "cuda", dtype)
    plan = plan_to(make_plan(tree, depth, name, scale), "cuda")

    def cascade(inputs: Inputs) -> torch.Tensor:
        return cascade_attention(inputs.query, inputs.key, inputs.value, inputs.prefixes, plan)

    def dense(inputs: Inputs) -> torch.Tensor:
        return dense_attention(inputs, tree, depth, scale)

    for errors in errors_beside_naive(cascade, dense, narrow, "cpu"):
        assert errors.is_fine, errors
