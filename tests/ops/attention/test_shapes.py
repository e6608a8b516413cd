"""Blocks of every shape, from any source, with windows, sinks, softcap and unequal head dims, on every backend."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from attention_errors import relative, tolerance_of
from attention_layouts import SHAPES, attend, counts, layout_in_order, layout_with_ranges, self_layout
from stand_in_backends import STAND_INS, running_on_stand_in

from kvpref.errors import InputError
from kvpref.ops.attention import AttentionParams, CascadePlan, VarlenBlock, cascade_attention, get_backend
from kvpref.ops.attention.backends import tiled
from kvpref.prefix.blocks import VarlenLayout

# float64 sums of at most a hundred terms, and weights that are exponentials of sums of eight.
TOLERANCE = 1e-11
CPU_BACKENDS = ("reference", "tiled", "cpu_flash")
SCALE = 0.37


@pytest.fixture(params=[*CPU_BACKENDS, *STAND_INS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A backend that takes CPU tensors; `tiled` with tiles of a few queries."""
    monkeypatch.setattr(tiled, "MAX_SCORES", 60)
    if request.param in CPU_BACKENDS:
        yield request.param
        return
    with running_on_stand_in(request.param, monkeypatch) as name:
        yield name


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pass over its own rows and two prefixes."""

    layouts: tuple[VarlenLayout, ...]
    num_rows: tuple[int, int, int]

    @property
    def blocks(self) -> tuple[VarlenBlock, ...]:
        return tuple(map(VarlenBlock.from_layout, self.layouts))


def make_case(seed: int, window: int | None = None) -> Case:
    """Blocks of all shapes: with ranges over the own rows and the first prefix, in order over the second."""
    generator = random.Random(seed)
    num_queries, num_first = generator.randint(20, 45), generator.randint(12, 30)
    in_order, num_second = layout_in_order(generator, generator.choice(SHAPES), num_queries, source=2)
    layouts = [self_layout(generator, num_queries, window), in_order]
    for shape, source in product(SHAPES, (0, 1)):
        layouts.append(layout_with_ranges(generator, shape, num_queries, (num_queries, num_first)[source], source))
    return Case(layouts=tuple(layouts), num_rows=(num_queries, num_first, num_second))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Tensors:
    """Leaves of a case: 4 heads over 2, head dims as given, and a sink."""

    def __init__(self, case: Case, head_dim: int = 8, value_head_dim: int = 8) -> None:
        self.query = numbers(case.num_rows[0], 4, head_dim).requires_grad_()
        self.pairs = [
            (
                numbers(rows, 2, head_dim, seed=i).requires_grad_(),
                numbers(rows, 2, value_head_dim, seed=-i).requires_grad_(),
            )
            for i, rows in enumerate(case.num_rows, start=1)
        ]
        self.sink = numbers(4).requires_grad_()
        self.dout = numbers(case.num_rows[0], 4, value_head_dim, seed=9)

    def leaves(self, with_sink: bool = True) -> list[torch.Tensor]:
        return [self.query, *(tensor for pair in self.pairs for tensor in pair), *([self.sink] if with_sink else [])]


def check(case: Case, tensors: Tensors, backend: str, *, softcap: float | None = None, with_sink: bool = True) -> None:
    """The output and every gradient against dense attention."""
    sink = tensors.sink if with_sink else None
    plan = CascadePlan(blocks=case.blocks, params=AttentionParams(scale=SCALE, softcap=softcap), backend=backend)
    (key, value), *prefixes = tensors.pairs
    out = cascade_attention(tensors.query, key, value, prefixes, plan, sink)
    truth = attend(tensors.query, tensors.pairs, counts(case.layouts, case.num_rows), SCALE, softcap, sink)
    torch.testing.assert_close(out, truth, rtol=0, atol=TOLERANCE)
    leaves = tensors.leaves(with_sink)
    found, expected = (torch.autograd.grad(result, leaves, tensors.dout) for result in (out, truth))
    for grad, true_grad in zip(found, expected, strict=True):
        assert grad.is_contiguous()
        torch.testing.assert_close(grad, true_grad, rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize(
    "seed", [0, 1, pytest.param(2, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)]
)
def test_every_shape_from_every_source(backend: str, seed: int) -> None:
    case = make_case(seed)
    check(case, Tensors(case), backend, with_sink=seed % 2 == 1)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_windows_of_self_blocks(backend: str, window: int) -> None:
    case = make_case(window, window)
    only = Case(layouts=case.layouts[:2], num_rows=case.num_rows)  # a prefix that no block reads gets zeros
    check(only, Tensors(only), backend, with_sink=False)


@pytest.mark.parametrize("head_dims", [(8, 4), (4, 8)], ids=str)
def test_values_of_another_head_dim(backend: str, head_dims: tuple[int, int]) -> None:
    case = make_case(4, window=7)
    check(case, Tensors(case, *head_dims), backend)


@pytest.mark.parametrize("window", [None, 3])
def test_softcap(backend: str, window: int | None) -> None:
    """Scores reach 3, so a cap of 2 bends them."""
    case = make_case(5, window)
    if get_backend(backend).can.softcap:
        check(case, Tensors(case), backend, softcap=2.0)
        return
    with pytest.raises(
        InputError, match=f"'{backend}' cannot run here: it has no softcap; these can: .*tiled, reference"
    ):
        check(case, Tensors(case), backend, softcap=2.0)


def test_auto_takes_what_has_a_softcap() -> None:
    case = make_case(5)
    check(case, Tensors(case), "auto", softcap=2.0)


def test_rows_that_see_nothing_have_no_output_and_pass_no_gradient(backend: str) -> None:
    """Where no block has keys for them; in the merge, neither of two results may make a NaN of them."""
    layouts = tuple(
        VarlenLayout(cu_seqlens_q=(0, 4, 6, 9), cu_seqlens_k=(0, 0, 2, 5), shape=shape, source=source)
        for shape, source in zip(SHAPES, (0, 1, 2), strict=True)
    )
    layouts = (VarlenLayout(cu_seqlens_q=(0, 4, 9), cu_seqlens_k=(0, 0, 9), shape="rectangle"), *layouts[1:])
    case = Case(layouts=layouts, num_rows=(9, 5, 5))
    tensors = Tensors(case)
    check(case, tensors, backend, with_sink=False)
    plan = CascadePlan(blocks=case.blocks, params=AttentionParams(scale=SCALE), backend=backend)
    (key, value), *prefixes = tensors.pairs
    out = cascade_attention(tensors.query, key, value, prefixes, plan)
    assert out[:4].count_nonzero() == 0
    (grad,) = torch.autograd.grad(out, [tensors.query], tensors.dout)
    assert grad[:4].count_nonzero() == 0
    check(case, tensors, backend)


def test_what_is_not_seen_changes_nothing(backend: str) -> None:
    """Other numbers in a source's row leave the queries that do not see it as they are, to the bit."""
    case = make_case(6, window=4)
    seen = counts(case.layouts, case.num_rows)
    params = AttentionParams(scale=SCALE)

    def run(row: int, number: float) -> torch.Tensor:
        tensors = Tensors(case)
        pairs = [tuple(tensor.detach().clone() for tensor in pair) for pair in tensors.pairs]
        for tensor in pairs[1]:
            tensor[row] = number
        plan = CascadePlan(blocks=case.blocks, params=params, backend=backend)
        return cascade_attention(tensors.query.detach(), *pairs[0], pairs[1:], plan, tensors.sink.detach())

    seen = seen[:, case.num_rows[0] :][:, : case.num_rows[1]]
    rows = [row for row in range(case.num_rows[1]) if 0 < seen[:, row].count_nonzero() < len(seen)]
    assert len(rows) > 2
    for row in (rows[0], rows[-1]):
        blind = seen[:, row] == 0
        before, after = run(row, 0.5), run(row, 2.0)
        assert torch.equal(before[blind], after[blind])
        assert (before[~blind] != after[~blind]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("backend_name", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_computed_in_fp32(backend_name: str, dtype: torch.dtype) -> None:
    """Blocks' shares of a gradient are rounded once, when they have been added up."""
    case = make_case(7, window=6)
    exact = Tensors(case)
    for tensor in exact.leaves():
        tensor.data = tensor.data.to(dtype).double()
    truth = attend(exact.query, exact.pairs, counts(case.layouts, case.num_rows), SCALE, None, exact.sink)
    dout = exact.dout.to(dtype)
    expected = torch.autograd.grad(truth, exact.leaves(), dout.double())
    query, sink = (tensor.detach().to(dtype).requires_grad_() for tensor in (exact.query, exact.sink))
    pairs = [tuple(tensor.detach().to(dtype).requires_grad_() for tensor in pair) for pair in exact.pairs]
    plan = CascadePlan(blocks=case.blocks, params=AttentionParams(scale=SCALE), backend=backend_name)
    out = cascade_attention(query, *pairs[0], pairs[1:], plan, sink)
    found = torch.autograd.grad(out, [query, *(tensor for pair in pairs for tensor in pair), sink], dout)
    assert {grad.dtype for grad in found} == {dtype}
    for grad, true_grad in zip((out, *found), (truth, *expected), strict=True):
        assert relative(grad, true_grad) <= tolerance_of(dtype)
