"""The fused log-probs against their two-line definition, at tile edges, extremes, and in memory."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakSet

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpref.ops.logprob.statistics import HeadParams, naive_token_logprobs, token_logprobs
from kvpref.ops.logprob.tiles import tiles_for

# The tiles never have fewer columns than this, so a vocabulary must be larger to be cut at all.
TILE = 256


class Case(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None


def make_case(
    num_tokens: int, vocab_size: int, dtype: torch.dtype = torch.float64, bias: bool = True, hidden_size: int = 8
) -> Case:
    generator = torch.Generator().manual_seed(num_tokens * 1000 + vocab_size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return Case(
        random(num_tokens, hidden_size), random(vocab_size, hidden_size), targets, random(vocab_size) if bias else None
    )


def run(function: Any, case: Case, params: HeadParams | None = None) -> list[torch.Tensor]:
    """Log-probs and the gradients of a weighted sum of them."""
    logps = function(case.hidden, case.weight, case.targets, bias=case.bias, params=params)
    weights = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    inputs = [tensor for tensor in (case.hidden, case.weight, case.bias) if tensor is not None and tensor.requires_grad]
    return [logps.detach(), *torch.autograd.grad((logps * weights).sum(), inputs)]


def assert_same(case: Case, params: HeadParams | None = None, tolerance: float = 1e-12) -> None:
    for found, truth in zip(run(token_logprobs, case, params), run(naive_token_logprobs, case, params), strict=True):
        assert found.dtype == truth.dtype
        assert (found - truth).norm() <= tolerance * truth.norm().clamp(min=1e-30)


# Both are float64 sums of a few hundred terms: 1e-15 measured, 1e-12 allowed.
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.125, 3.0])
@pytest.mark.parametrize("vocab_size", [1, 2, 101, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 3])
def test_fp64_against_the_definition(vocab_size: int, scale: float, bias: bool) -> None:
    params = HeadParams(logit_scale=scale, max_tile_bytes=1)
    assert_same(make_case(7, vocab_size, bias=bias), params)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.5, 3.0, 1e6])
@pytest.mark.parametrize("vocab_size", [1, TILE - 1, 2 * TILE + 3])
def test_softcap_against_the_definition(vocab_size: int, softcap: float, bias: bool) -> None:
    params = HeadParams(logit_scale=0.7, softcap=softcap, temperature=1.3, max_tile_bytes=1)
    assert_same(make_case(7, vocab_size, bias=bias), params)


# Sums of 259 products in fp32, in two orders, with tanh between; 3e-7 measured.
def test_fp32_softcap_against_fp64() -> None:
    params = HeadParams(softcap=3.0, temperature=0.8, max_tile_bytes=1)
    case = make_case(7, TILE + 3)
    narrow = Case(*(None if each is None else each.detach().float().requires_grad_() for each in case[:2]), *case[2:])
    narrow = narrow._replace(bias=case.bias.detach().float().requires_grad_())
    for found, truth in zip(run(token_logprobs, narrow, params), run(naive_token_logprobs, case, params), strict=True):
        assert found.dtype == torch.float32
        assert (found - truth).norm() <= 1e-6 * truth.norm()


@pytest.mark.parametrize("max_tile_bytes", [1, 7 * 300 * 8, None])
def test_tile_size_does_not_change_results(max_tile_bytes: int | None) -> None:
    assert_same(make_case(7, 4 * TILE), HeadParams(max_tile_bytes=max_tile_bytes))


def test_row_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of rows add up in the weight's gradient."""
    monkeypatch.setattr("kvpref.ops.logprob.tiles._MAX_TOKENS_PER_TILE", 4)
    for num_tokens in (3, 4, 5, 13):
        assert_same(make_case(num_tokens, 2 * TILE + 3), HeadParams(max_tile_bytes=1))


def test_targets_at_tile_edges() -> None:
    edges = [0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 2]
    case = make_case(len(edges), 2 * TILE + 3)._replace(targets=torch.tensor(edges))
    assert_same(case, HeadParams(max_tile_bytes=1))


def test_gradcheck() -> None:
    case = make_case(3, TILE + 2, hidden_size=3)

    def function(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        params = HeadParams(logit_scale=0.5, max_tile_bytes=1)
        return token_logprobs(hidden, weight, case.targets, bias=bias, params=params)

    assert torch.autograd.gradcheck(function, (case.hidden, case.weight, case.bias), fast_mode=True)


def test_fp32_result_and_accuracy() -> None:
    """float32 rounds at 6e-8; a norm over sums of some hundred terms stays below 1e-6."""
    case = make_case(9, 2 * TILE + 3, torch.float32)
    exact = Case(*(None if t is None else t.detach().double().requires_grad_(t.is_floating_point()) for t in case))
    exact = exact._replace(targets=case.targets)
    for found, truth in zip(run(token_logprobs, case), run(naive_token_logprobs, exact), strict=True):
        assert found.dtype == torch.float32
        assert (found - truth).norm() <= 1e-6 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """Against fp64 on the same 16-bit numbers: log-probs as good as fp32, gradients rounded once to 16 bits."""
    case = make_case(9, 2 * TILE + 3, dtype)
    exact = Case(*(None if t is None else t.detach().double().requires_grad_(t.is_floating_point()) for t in case))
    exact = exact._replace(targets=case.targets)
    found, truth = run(token_logprobs, case), run(naive_token_logprobs, exact)
    assert found[0].dtype == torch.float32
    assert (found[0] - truth[0]).norm() <= 1e-6 * truth[0].norm()
    for grad, true_grad in zip(found[1:], truth[1:], strict=True):
        assert grad.dtype == dtype
        # One rounding to nearest of each entry: half a unit in the last place, relative to the entry.
        assert (grad - true_grad).norm() <= torch.finfo(dtype).eps * true_grad.norm()


def test_large_logits_stay_finite() -> None:
    """exp of 1e4 overflows in any dtype unless the maximum is taken off first."""
    case = make_case(5, 2 * TILE + 3, torch.float32)
    for factor in (1e4, -1e4):
        big = case._replace(hidden=(case.hidden * factor).detach().requires_grad_())
        for found, truth in zip(run(token_logprobs, big), run(naive_token_logprobs, big), strict=True):
            assert found.isfinite().all()
            # Logits of 1e4 carry an absolute rounding error of 1e-3 in float32, which enters the softmax exponents.
            assert (found - truth).norm() <= 1e-2 * truth.norm()


def test_vocabulary_that_is_masked_out() -> None:
    """A bias of -inf removes tokens, even a whole tile of them, without a NaN."""
    case = make_case(4, 3 * TILE)
    bias = torch.zeros(3 * TILE, dtype=torch.float64)
    bias[: TILE + 5] = float("-inf")
    masked = case._replace(
        bias=bias.requires_grad_(), targets=torch.tensor([TILE + 5, TILE + 6, 2 * TILE, 3 * TILE - 1])
    )
    assert_same(masked, HeadParams(max_tile_bytes=1))


def test_probabilities_sum_to_one() -> None:
    case = make_case(1, TILE + 4)
    everything = torch.arange(TILE + 4)
    hidden = case.hidden.expand(TILE + 4, -1)
    logps = token_logprobs(hidden, case.weight, everything, bias=case.bias, params=HeadParams(max_tile_bytes=1))
    assert logps.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_targets_outside_the_vocabulary_give_nan() -> None:
    """A wrong number would pass unnoticed; an exception would need a synchronisation on GPUs."""
    case = make_case(3, TILE + 4)
    targets = torch.tensor([-100, TILE + 4, 7])
    assert token_logprobs(case.hidden, case.weight, targets).isnan().tolist() == [True, True, False]


def test_no_tokens() -> None:
    case = make_case(0, 11)
    logps = token_logprobs(case.hidden, case.weight, case.targets, bias=case.bias)
    assert logps.shape == (0,)
    grads = torch.autograd.grad(logps.sum(), (case.hidden, case.weight, case.bias))
    assert [grad.count_nonzero().item() for grad in grads] == [0, 0, 0]


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    case = make_case(5, TILE + 3)
    partly = case._replace(**{frozen: getattr(case, frozen).detach()})
    assert len(run(token_logprobs, partly)) == 3
    assert_same(partly)


def test_non_contiguous_inputs() -> None:
    case = make_case(6, TILE + 3)
    strided = case._replace(
        hidden=case.hidden.detach().T.contiguous().T.requires_grad_(),
        weight=case.weight.detach().T.contiguous().T.requires_grad_(),
    )
    assert_same(strided)


def test_second_derivatives_are_refused() -> None:
    case = make_case(3, 11)
    logps = token_logprobs(case.hidden.square(), case.weight, case.targets)
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((logps * weights).sum(), case.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class LargestTensor(TorchDispatchMode):
    """Notes the most elements any operation returned in one tensor."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


def test_the_full_logits_never_exist() -> None:
    """No tensor of S x V elements, nor any beyond the tile and the inputs' own size."""
    num_tokens, vocab_size, tile_bytes = 64, 32 * TILE, 64 * TILE * 4
    case = make_case(num_tokens, vocab_size, torch.float32)
    with LargestTensor() as largest:
        run(token_logprobs, case, HeadParams(max_tile_bytes=tile_bytes))
    assert largest.num_elements == max(tile_bytes // 4, case.weight.numel())
    assert largest.num_elements < num_tokens * vocab_size / 4
    with LargestTensor() as naive_largest:
        run(naive_token_logprobs, case)
    assert naive_largest.num_elements == num_tokens * vocab_size


def test_tile_bound_holds_for_many_tokens() -> None:
    """However many tokens there are, no tile is larger than `max_tile_bytes`, down to one row of the least width."""
    case = make_case(600, 4 * TILE, torch.float32, bias=False, hidden_size=2)
    tile_bytes = 32 * TILE * 4
    with LargestTensor() as largest:
        run(token_logprobs, case, HeadParams(max_tile_bytes=tile_bytes))
    assert largest.num_elements <= tile_bytes // 4
    assert_same(make_case(600, 4 * TILE, bias=False, hidden_size=2), HeadParams(max_tile_bytes=tile_bytes))


@pytest.mark.parametrize(
    ("hidden", "weight", "targets"),
    [((3, 4), (5, 6), (3,)), ((3, 4), (5, 4), (2,)), ((1, 3, 4), (5, 4), (3,)), ((3, 4), (5, 4), (3, 1))],
)
def test_shapes_that_do_not_fit(hidden: tuple[int, ...], weight: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hidden \(S, K\), weight \(V, K\) and targets \(S,\)"):
        token_logprobs(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64))


def test_tile_bytes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_tile_bytes must be positive; got 0"):
        HeadParams(max_tile_bytes=0)


def test_weight_gradient_is_added_in_place() -> None:
    hidden, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.tensor([0, 10, 3, 3, 7])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        plain = weight.to(dtype, copy=True).requires_grad_()
        token_logprobs(hidden.to(dtype), plain, targets).sum().backward()
        given = weight.to(dtype, copy=True).requires_grad_()
        before = torch.ones_like(given)
        total = before.clone()
        token_logprobs(hidden.to(dtype), given, targets, weight_grad=total).sum().backward()
        assert given.grad is None
        torch.testing.assert_close(total - before, plain.grad, rtol=tolerance, atol=tolerance)


class Casts(TorchDispatchMode):
    """Notes the shape of every tensor that is copied to another dtype, and the most tiles that are held at once.

    Products of 16-bit numbers with fp32 results, which the CPU does not have, are computed in fp32: exactly the same
    factors, so that casting elsewhere would change the numbers.
    """

    def __init__(self, tile: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self._tile, self._storages = set(tile), WeakSet()
        self.most_tiles = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.dtype:
            left, right, dtype = args
            assert left.dtype == right.dtype == torch.bfloat16
            result = torch.mm(left.to(dtype), right.to(dtype))
        else:
            result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(result.shape))
        if isinstance(result, torch.Tensor) and set(result.shape) == self._tile:
            self._storages.add(result.untyped_storage())
            self.most_tiles = max(self.most_tiles, len(self._storages))
        return result


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_on_cuda_each_tile_is_cast_once(weights: torch.dtype) -> None:
    """Of the backward pass: dlogits once, under autocast each tile of the weight and the hidden states once."""
    num_tokens, hidden_size, num_tiles = 9, 8, 3
    case = make_case(num_tokens, num_tiles * TILE, weights, bias=False, hidden_size=hidden_size)
    casts = Casts((num_tokens, TILE))
    with torch.autocast("cpu", torch.bfloat16), tiles_for("cuda"), casts:
        logps = token_logprobs(
            case.hidden, case.weight, case.targets, params=HeadParams(max_tile_bytes=num_tokens * TILE * 4)
        )
        forward = casts.shapes
        casts.shapes = []
        logps.sum().backward()
    narrow = weights == torch.bfloat16
    assert casts.shapes.count((num_tokens, TILE)) + casts.shapes.count((TILE, num_tokens)) == num_tiles
    for shapes in (forward, casts.shapes):
        assert shapes.count((TILE, hidden_size)) == (0 if narrow else num_tiles)
    assert forward.count((num_tokens, hidden_size)) == (0 if narrow else 1)
    # Besides, the gradient is given in the dtype of the hidden states.
    assert casts.shapes.count((num_tokens, hidden_size)) == 1
    # The wide tile and its narrow copy.
    assert casts.most_tiles == 2
