"""`cuda_flash` against float64 references: blocks, trees, and a whole model."""

from __future__ import annotations

import oracle
import pytest
import torch
from dense_attention import Inputs, dense_attention, make_inputs, make_plan, random_tree
from sample_groups import five_levels, pairs
from tiny_models import tiny_model

import kvpref
from kvpref.attention import AttentionParams, CascadePlan, VarlenBlock, cascade_attention, get_backend, select_backend
from kvpref.layout import VarlenLayout
from kvpref.plans import tensors_to

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PARAMS = AttentionParams(scale=0.5)


def block_of(q: tuple[int, ...], k: tuple[int, ...], causal: bool = False) -> VarlenBlock:
    return VarlenBlock.from_layout(VarlenLayout(cu_seqlens_q=q, cu_seqlens_k=k, causal=causal), "cuda")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to("cuda", dtype)


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double().cpu() - truth.double().cpu()).norm() / truth.double().norm().cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("q", "k", "causal"),
    [
        ((0, 3, 9, 10), (0, 3, 9, 10), True),
        ((0, 200, 457), (0, 200, 457), True),
        ((0, 3, 3, 10), (0, 5, 9, 200), False),
        ((0, 0, 10), (0, 300, 310), False),
        ((0, 10, 10), (0, 300, 310), False),
    ],
    ids=["self", "long self", "pair without queries", "first without queries", "last without queries"],
)
def test_blocks_against_the_reference(q: tuple[int, ...], k: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    """The kernel rounds probabilities and results to 16 bits: a few units in the last place, on norms."""
    query, key, value = random(q[-1], 8, 64, dtype=dtype), *(random(k[-1], 2, 64, dtype=dtype) for _ in range(2))
    block, dout = block_of(q, k, causal), random(q[-1], 8, 64, dtype=dtype)
    exact = [tensor.double() for tensor in (query, key, value)]
    true_out, true_lse = get_backend("reference").forward(*exact, block, PARAMS)
    out, lse = get_backend("cuda_flash").forward(query, key, value, block, PARAMS)
    tolerance = 4 * torch.finfo(dtype).eps
    assert relative(out, true_out) <= tolerance
    assert lse.shape == true_lse.shape
    assert lse.dtype == torch.float32
    assert relative(lse, true_lse) <= tolerance
    found = get_backend("cuda_flash").backward(dout, query, key, value, out, lse, block, PARAMS)
    truth = get_backend("reference").backward(dout.double(), *exact, true_out, true_lse, block, PARAMS)
    for grad, true_grad in zip(found, truth, strict=True):
        assert grad.isfinite().all()
        assert relative(grad, true_grad) <= tolerance


def test_keys_without_queries_get_zero_gradients() -> None:
    """Nobody reads them, so their rows must be zeros, not what the allocator left there."""
    query, key = random(6, 4, 64), random(500, 2, 64)
    block = block_of((0, 6, 6), (0, 10, 500))
    for _ in range(3):
        garbage = torch.full((500, 2, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
        del garbage
        out, lse = get_backend("cuda_flash").forward(query, key, key, block, PARAMS)
        _, dk, dv = get_backend("cuda_flash").backward(query, query, key, key, out, lse, block, PARAMS)
        assert dk[10:].count_nonzero() == 0
        assert dv[10:].count_nonzero() == 0


def test_rows_without_keys_have_lse_minus_infinity() -> None:
    query, key = random(5, 4, 64), random(3, 4, 64)
    out, lse = get_backend("cuda_flash").forward(query, key, key, block_of((0, 2, 5), (0, 0, 3)), PARAMS)
    assert (lse[:, :2] == float("-inf")).all()
    assert lse[:, 2:].isfinite().all()
    assert out[:2].count_nonzero() == 0


def to_cuda(plan: CascadePlan) -> CascadePlan:
    return CascadePlan(
        self_block=tensors_to(plan.self_block, "cuda"),
        cross_blocks=tuple(tensors_to(block, "cuda") for block in plan.cross_blocks),
        params=plan.params,
        backend=plan.backend,
    )


def leaves_to(inputs: Inputs, device: str, dtype: torch.dtype) -> Inputs:
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device, dtype).requires_grad_()

    prefixes = [(moved(key), moved(value)) for key, value in inputs.prefixes]
    return Inputs(moved(inputs.query), moved(inputs.key), moved(inputs.value), prefixes)


def run(function: object, inputs: Inputs) -> list[torch.Tensor]:
    out = function(inputs)  # type: ignore[operator]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs.leaves(), dout.to(out.device, out.dtype))]


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_trees_are_no_worse_than_naive_bf16(depth: int, head_dim: int, heads: tuple[int, int]) -> None:
    """Against float64 on the same bf16 numbers; dense attention in bf16 sets the scale of what rounding costs."""
    tree, scale = random_tree(1), head_dim**-0.5
    narrow = leaves_to(make_inputs(tree, depth, *heads, head_dim), "cuda", torch.bfloat16)
    plan = to_cuda(make_plan(tree, depth, "cuda_flash", scale))

    def cascade(inputs: Inputs) -> torch.Tensor:
        return cascade_attention(inputs.query, inputs.key, inputs.value, inputs.prefixes, plan)

    def dense(inputs: Inputs) -> torch.Tensor:
        return dense_attention(inputs, tree, depth, scale)

    truth = run(dense, leaves_to(narrow, "cpu", torch.float64))
    baseline = run(dense, leaves_to(narrow, "cpu", torch.bfloat16))
    for found, naive, exact in zip(run(cascade, narrow), baseline, truth, strict=True):
        assert found.isfinite().all()
        if exact.norm() > 0:
            # One bf16 rounding on top: tiny tensors may be luckier in the baseline than twice can cover.
            assert relative(found, exact) <= 2 * relative(naive, exact) + torch.finfo(torch.bfloat16).eps


def test_auto_selects_it_for_16_bit_only() -> None:
    assert select_backend("auto", random(1, 1, 64)).name == "cuda_flash"
    assert select_backend("auto", random(1, 1, 64, dtype=torch.float32)).name == "efficient"
    with pytest.raises(ValueError, match=r"float16 or bfloat16.*these can: efficient, reference"):
        select_backend("cuda_flash", random(1, 1, 64, dtype=torch.float32))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("mode", ["two_pass", "one_pass", "packed", "padded"])
@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_models_are_no_worse_than_naive_bf16(kind: str, mode: str, checkpointing: bool) -> None:
    dtype = torch.bfloat16 if kind == "weights" else torch.float32
    groups = five_levels() + pairs()
    model = tiny_model("mistral", dtype).cuda()  # head dim 16: the kernel needs a multiple of 8
    exact = oracle.naive(oracle.twin(model, torch.float64), groups)
    with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"):
        baseline = oracle.naive(oracle.twin(model), groups)
        if checkpointing:
            oracle.checkpoint_layers(model)
        batch = kvpref.collate(groups, min_shared_tokens=1, device="cuda")
        found = oracle.shared(kvpref.attach(model), batch, mode=mode)
    assert oracle.relative_error(found.token_logps, exact.token_logps) <= 2 * oracle.relative_error(
        baseline.token_logps, exact.token_logps
    )
    for name, grad in exact.grads.items():
        if grad.ndim > 1:
            allowed = 2 * oracle.relative_error(baseline.grads[name], grad)
            assert oracle.relative_error(found.grads[name], grad) <= allowed, name


def test_fp32_model_on_cuda() -> None:
    """`auto` on the GPU, fp32 with TF32 off: 6e-8 per operation, amplified by norms and softmax."""
    groups = five_levels()
    model = tiny_model("mistral", torch.float32).cuda()
    truth = oracle.naive(tiny_model("mistral", torch.float64), groups)
    truth = oracle.Result(truth.token_logps.cuda(), {name: grad.cuda() for name, grad in truth.grads.items()})
    batch = kvpref.collate(groups, min_shared_tokens=1, device="cuda")
    oracle.assert_same(oracle.shared(kvpref.attach(model), batch), truth, 1e-5)
