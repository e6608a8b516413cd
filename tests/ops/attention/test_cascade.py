"""Cascade attention on random trees against dense attention: the output and every gradient, for each backend."""

from __future__ import annotations

import pytest
import torch
from dense_attention import Inputs, dense_attention, make_inputs, make_plan, num_rows, random_tree
from torch import nn

from kvpref.ops.attention import CascadePlan, VarlenBlock, cascade_attention
from kvpref.prefix.blocks import VarlenLayout
from kvpref.prefix.building import build_tree

CPU_BACKENDS = ("reference", "cpu_flash")
SCALE = 0.37

# float64 sums of at most a hundred terms: 1e-15 measured.
FP64_TOLERANCE = 1e-12
# The same in float32, whose rounding is 6e-8: 1e-6 measured on norms.
FP32_TOLERANCE = 5e-6


def run(inputs: Inputs, plan: CascadePlan) -> torch.Tensor:
    return cascade_attention(inputs.query, inputs.key, inputs.value, inputs.prefixes, plan)


def gradients(out: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return list(torch.autograd.grad(out, inputs.leaves(), dout.to(out.dtype)))


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.detach().double() - truth.detach()).norm() / truth.detach().norm())


def in_float64(inputs: Inputs) -> Inputs:
    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().double().requires_grad_()

    prefixes = [(widen(key), widen(value)) for key, value in inputs.prefixes]
    return Inputs(widen(inputs.query), widen(inputs.key), widen(inputs.value), prefixes)


def worst(inputs: Inputs, plan: CascadePlan, tree_depth: tuple, scale: float = SCALE) -> float:  # type: ignore[type-arg]
    """Largest relative error of output and gradients against dense float64 attention on the same numbers."""
    exact = in_float64(inputs)
    truth, out = dense_attention(exact, *tree_depth, scale), run(inputs, plan)
    assert out.dtype == inputs.query.dtype
    assert out.shape == inputs.query.shape
    found_grads, true_grads = gradients(out, inputs), gradients(truth, exact)
    assert [grad.dtype for grad in found_grads] == [leaf.dtype for leaf in inputs.leaves()]
    return max(
        relative(out, truth), *(relative(f, t) for f, t in zip(found_grads, true_grads, strict=True) if t.norm() > 0)
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1, 3, 5])
def test_random_trees(seed: int, depth: int, backend: str) -> None:
    tree = random_tree(seed)
    assert tree.num_levels > depth
    inputs = make_inputs(tree, depth, 4, 2, 8)
    assert worst(inputs, make_plan(tree, depth, backend, SCALE), (tree, depth)) <= FP64_TOLERANCE


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("head_dim", [1, 5, 16, 64, 96])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 2)])
def test_head_counts_and_dims(heads: tuple[int, int], head_dim: int, backend: str) -> None:
    tree = random_tree(1)
    inputs = make_inputs(tree, 2, *heads, head_dim)
    scale = head_dim**-0.5
    assert worst(inputs, make_plan(tree, 2, backend, scale), (tree, 2), scale) <= FP64_TOLERANCE


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_float32(backend: str) -> None:
    tree = random_tree(7)
    inputs = make_inputs(tree, 2, 4, 2, 16, torch.float32)
    assert worst(inputs, make_plan(tree, 2, backend, SCALE), (tree, 2)) <= FP32_TOLERANCE


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_rounded_only_at_the_ends(dtype: torch.dtype, backend: str) -> None:
    """Computed in fp32, so the output and each gradient carry one rounding, plus that of the saved output.

    The output is saved in 16 bits and enters every gradient through rowsum(dout * out): two roundings at most.
    """
    tree = random_tree(7)
    inputs = make_inputs(tree, 2, 4, 2, 16, dtype)
    assert worst(inputs, make_plan(tree, 2, backend, SCALE), (tree, 2)) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_non_contiguous_inputs_and_gradients(backend: str) -> None:
    """What models hand over: (1, H, T, D) buffers seen as (T, H, D), and gradients expanded from a sum."""
    tree = random_tree(3)
    plain = make_inputs(tree, 1, 4, 2, 8)

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        view = tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        assert not view.is_contiguous()
        return view

    inputs = Inputs(*map(strided, plain[:3]), [(strided(k), strided(v)) for k, v in plain.prefixes])
    plan = make_plan(tree, 1, backend, SCALE)
    assert worst(inputs, plan, (tree, 1)) <= FP64_TOLERANCE
    found = torch.autograd.grad(run(inputs, plan).sum(), inputs.leaves())
    truth = torch.autograd.grad(dense_attention(plain, tree, 1, SCALE).sum(), plain.leaves())
    # A key's gradient under dout = 1 may vanish, so errors are measured against the largest gradient.
    size = max(float(grad.norm()) for grad in truth)
    assert max(float((f - t).norm()) for f, t in zip(found, truth, strict=True)) <= FP64_TOLERANCE * size


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_packed_projections_as_inputs(backend: str) -> None:
    """Phi3 and GPT-2 slice query, key and value out of one projection, so row strides are larger than a row."""
    tree = random_tree(0)
    count = num_rows(tree, 0)
    packed = torch.randn(count, 3 * 4 * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packed.requires_grad_()
    plan = make_plan(tree, 0, backend, SCALE)

    def split(tensor: torch.Tensor) -> Inputs:
        return Inputs(*(part.unflatten(1, (4, 8)) for part in tensor.split(32, dim=1)), [])

    weights = torch.randn(count, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((run(split(packed), plan) * weights).sum(), packed)
    (truth,) = torch.autograd.grad((dense_attention(split(packed), tree, 0, SCALE) * weights).sum(), packed)
    assert relative(found, truth) <= FP64_TOLERANCE


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck(backend: str) -> None:
    tree = build_tree([(1, 2, 3, 4, 5), (1, 2, 3, 6), (1, 2, 7, 9), (1, 2, 7, 8, 8), (9,)])
    inputs = make_inputs(tree, 2, 2, 1, 3)
    plan = make_plan(tree, 2, backend, SCALE)

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        return cascade_attention(query, key, value, list(zip(flat[::2], flat[1::2], strict=True)), plan)

    assert torch.autograd.gradcheck(function, inputs.leaves(), fast_mode=True)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_extreme_scores(backend: str) -> None:
    """Scores of some thousands: one key takes everything, and exp of the plain score would overflow."""
    tree = random_tree(1)
    inputs = make_inputs(tree, 2, 4, 2, 8)
    out, truth = run(inputs, make_plan(tree, 2, backend, 300.0)), dense_attention(inputs, tree, 2, 300.0)
    # Exponents of 1e4 with a rounding error of 1e-16 each cost four digits.
    assert relative(out, truth) <= 1e-11
    grads, true_grads = gradients(out, inputs), gradients(truth, inputs)
    # Many true gradients vanish here, so errors are measured against the largest.
    size = max(float(grad.norm()) for grad in true_grads)
    assert max(float((f - t).norm()) for f, t in zip(grads, true_grads, strict=True)) <= 1e-11 * size


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_prefix_gradients_add_up_in_fp32(backend: str) -> None:
    """4096 responses of one token in bf16: summing their shares in bf16 would stall near 256 of them."""
    num_responses, dtype = 4096, torch.bfloat16
    self_block = VarlenLayout(
        cu_seqlens_q=tuple(range(num_responses + 1)), cu_seqlens_k=tuple(range(num_responses + 1)), shape="causal"
    )
    cross = VarlenLayout(cu_seqlens_q=(0, num_responses), cu_seqlens_k=(0, 1), shape="rectangle", source=1)
    plan = make_plan(random_tree(0), 0, backend, SCALE)
    plan = CascadePlan(
        blocks=(VarlenBlock.from_layout(self_block), VarlenBlock.from_layout(cross)),
        params=plan.params,
        backend=plan.backend,
    )
    ones = torch.ones(num_responses, 1, 8, dtype=dtype)
    prefix = torch.ones(1, 1, 8, dtype=dtype, requires_grad=True)
    out = cascade_attention(torch.zeros_like(ones), ones, ones, [(prefix.detach(), prefix)], plan)
    out.sum().backward()
    # Both keys score 0, so each response gives its prefix value a weight of one half.
    assert prefix.grad is not None
    assert prefix.grad.flatten().tolist() == [num_responses / 2] * 8


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_second_derivatives_are_refused(backend: str) -> None:
    tree = random_tree(0)
    inputs = make_inputs(tree, 0, 2, 1, 4)
    out = run(inputs, make_plan(tree, 0, backend, SCALE))
    weights = torch.ones_like(out, requires_grad=True)
    (grad,) = torch.autograd.grad(out, inputs.query, weights, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cascade_backward.*no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("frozen", ["query", "key", "value"])
def test_frozen_inputs(frozen: str) -> None:
    tree = random_tree(0)
    inputs = make_inputs(tree, 1, 2, 1, 4)
    plan = make_plan(tree, 1, "cpu_flash", SCALE)
    expected = dict(zip("abcde", gradients(run(inputs, plan), inputs), strict=True))
    partly = inputs._replace(**{frozen: getattr(inputs, frozen).detach()})
    out = run(partly, plan)
    leaves = [leaf for leaf in partly.leaves() if leaf.requires_grad]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad(out, leaves, dout)
    kept = [grad for leaf, grad in zip(partly.leaves(), expected.values(), strict=True) if leaf.requires_grad]
    assert all(torch.equal(f, e) for f, e in zip(found, kept, strict=True))


def test_autocast_does_not_reach_inside() -> None:
    tree = random_tree(0)
    inputs = make_inputs(tree, 1, 4, 2, 8, torch.float32)
    for backend in CPU_BACKENDS:
        plan = make_plan(tree, 1, backend, SCALE)
        with torch.autocast("cpu", torch.bfloat16):
            assert worst(inputs, plan, (tree, 1)) <= FP32_TOLERANCE


def bad_inputs() -> dict[str, tuple[Inputs, str]]:
    tree = random_tree(0)
    good = make_inputs(tree, 1, 4, 2, 8)
    key, value = good.prefixes[0]
    return {
        "dtype": (good._replace(key=good.key.float()), r"query and key must have one dtype"),
        "prefix dtype": (good._replace(prefixes=[(key, value.float())]), r"query and prefix 0 must have one dtype"),
        "head dim": (good._replace(key=good.key[..., :4]), r"key .* does not fit query"),
        "value head dim": (good._replace(value=good.value[..., :4]), r"prefix 0 .* values of head dim 4"),
        "value heads": (good._replace(value=good.value[:, :1]), r"value .* does not fit query"),
        "heads": (good._replace(key=good.key.repeat(1, 2, 1)[:, :3]), r"number of key/value heads"),
        "missing prefix": (good._replace(prefixes=[]), r"blocks read 1 prefixes; got 0"),
        "short query": (good._replace(query=good.query[:-1]), r"queries .*; got"),
        "short key": (good._replace(key=good.key[:-1], value=good.value[:-1]), r"keys; got"),
        "short prefix": (good._replace(prefixes=[(key[:-1], value[:-1])]), r"keys; got"),
        "long prefix": (good._replace(prefixes=[(key.repeat(2, 1, 1), value.repeat(2, 1, 1))]), r"keys; got"),
        "short value": (good._replace(value=good.value[:-1]), r"keys; got"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_inputs_that_do_not_fit(name: str) -> None:
    inputs, message = bad_inputs()[name]
    with pytest.raises(ValueError, match=message):
        run(inputs, make_plan(random_tree(0), 1, "reference", SCALE))


def test_inside_a_module_under_checkpointing() -> None:
    """A checkpointed caller recomputes the op from the same inputs: the gradients are the same bits."""
    tree = random_tree(1)
    inputs = make_inputs(tree, 1, 4, 2, 8)
    plan = make_plan(tree, 1, "cpu_flash", SCALE)
    layer = nn.Linear(8, 8, dtype=torch.float64)

    def forward(*leaves: torch.Tensor) -> torch.Tensor:
        query, key, value, *flat = leaves
        return cascade_attention(layer(query), key, value, [(flat[0], flat[1])], plan)

    plain = gradients(forward(*inputs.leaves()), inputs)
    again = gradients(torch.utils.checkpoint.checkpoint(forward, *inputs.leaves(), use_reentrant=False), inputs)
    assert all(torch.equal(first, second) for first, second in zip(plain, again, strict=True))
