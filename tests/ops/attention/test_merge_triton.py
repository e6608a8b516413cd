"""The Triton merge against the plain one, on CPU through Triton's interpreter."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from kvpref.ops.attention import merge

pytest.importorskip("triton", reason="needs Triton (Linux only)")


@pytest.fixture
def merge_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module with its kernel interpreted: Triton decides that when the kernel is defined."""
    name = "kvpref.ops.attention.merge_triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(name, None)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def make_partials(count: int, shape: tuple[int, int, int], dtype: torch.dtype) -> list[merge.Partial]:
    generator = torch.Generator().manual_seed(sum(shape))
    num_rows, num_heads, _ = shape
    parts = []
    for _ in range(count):
        out = torch.randn(shape, generator=generator).to(dtype)
        parts.append((out, 5 * torch.randn(num_heads, num_rows, generator=generator)))
    return parts


# One unit in the last place for bf16, which the interpreter truncates to; half a unit for fp16, which it rounds to.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


# Also head dims that 16 does not divide.
SHAPES = [(1, 1, 8), (33, 3, 40), (64, 2, 128), (5, 3, 72), (3, 2, 100)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_plain_merge(shape: tuple[int, int, int], dtype: torch.dtype, merge_triton: ModuleType) -> None:
    first, second = make_partials(2, shape, dtype)
    expected, expected_lse = merge.merge_partials(first, second, dtype)
    found, lse = merge_triton.merge_two(*((out.clone(), lse.clone()) for out, lse in (first, second)), dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)


def test_a_third_part_meets_an_unrounded_sum(merge_triton: ModuleType) -> None:
    first, second, third = make_partials(3, (33, 3, 40), torch.bfloat16)
    expected, _ = merge.merge_partials(merge.merge_partials(first, second, torch.float32), third, torch.bfloat16)
    between = merge_triton.merge_two(first, second, torch.float32)
    assert between[0].dtype == torch.float32
    found, _ = merge_triton.merge_two(between, third, torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


def test_kernels_start_on_the_tensors_device(merge_triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, which is another one for a reference model on the second GPU."""
    entered: list[torch.Tensor] = []
    launched_inside: list[bool] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield
        entered.pop()

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **kwargs: launched_inside.append(entered == [args[4]])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(merge_triton, "_merge_kernel", Kernel())
    merge_triton.merge_two(*make_partials(2, (7, 2, 16), torch.float32), torch.float32)
    assert launched_inside == [True]


@pytest.mark.parametrize("no_keys", [float("-inf"), float("inf")])
def test_rows_without_keys_and_large_differences(no_keys: float, merge_triton: ModuleType) -> None:
    (first, first_lse), (second, second_lse) = make_partials(2, (7, 2, 16), torch.float32)
    first_lse[:, 2], second_lse[:, 4] = float("-inf"), float("-inf")
    first_lse[:, 5], second_lse[:, 6] = 3e4, 3e4
    expected_lse = torch.logaddexp(first_lse, second_lse)
    first_lse[:, 2], second_lse[:, 4] = no_keys, no_keys
    out, lse = merge_triton.merge_two((first.clone(), first_lse.clone()), (second, second_lse), torch.float32)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[2], second[2])
    assert torch.equal(out[4], first[4])
    assert torch.equal(out[5], first[5])
    assert torch.equal(out[6], second[6])


def test_non_contiguous_parts(merge_triton: ModuleType) -> None:
    parts = make_partials(2, (9, 4, 16), torch.float32)
    expected, _ = merge.merge_partials(*parts, torch.float32)
    strided = [(out.transpose(0, 1).contiguous().transpose(0, 1), lse.T.contiguous().T) for out, lse in parts]
    assert not any(tensor.is_contiguous() for part in strided for tensor in part)
    found, _ = merge_triton.merge_two(*strided, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("no_keys", [float("-inf"), float("inf")])
def test_rows_without_keys_in_both(no_keys: float, merge_triton: ModuleType) -> None:
    (first, first_lse), (second, second_lse) = make_partials(2, (7, 2, 16), torch.float32)
    first[3], second[3] = 0.0, 0.0
    first_lse[:, 3], second_lse[:, 3] = no_keys, float("-inf")
    for merge_two in (merge_triton.merge_two, merge.merge_partials):
        out, lse = merge_two((first.clone(), first_lse.clone()), (second, second_lse), torch.float32)
        assert out[3].count_nonzero() == 0
        assert (lse[:, 3] == float("-inf")).all()
        assert lse[:, :3].isfinite().all()
