"""The Triton merge against the plain one, on CPU through Triton's interpreter."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from kvpref.attention import merge

pytest.importorskip("triton", reason="needs Triton (Linux only)")


@pytest.fixture
def merge_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module with its kernel interpreted: Triton decides that when the kernel is defined."""
    name = "kvpref.attention.merge_triton"
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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1, 8), (33, 3, 40), (64, 2, 128)], ids=str)
def test_equals_the_plain_merge(
    shape: tuple[int, int, int], count: int, dtype: torch.dtype, merge_triton: ModuleType
) -> None:
    parts = make_partials(count, shape, dtype)
    expected, expected_lse = merge.merge_partials(parts, dtype)
    found, lse = merge._merge_fused([(out.clone(), lse.clone()) for out, lse in parts], dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)


def test_rows_without_keys_and_large_differences(merge_triton: ModuleType) -> None:
    (first, first_lse), (second, second_lse) = make_partials(2, (7, 2, 16), torch.float32)
    first_lse[:, 2], second_lse[:, 4] = float("-inf"), float("-inf")
    first_lse[:, 5], second_lse[:, 6] = 3e4, 3e4
    expected_lse = torch.logaddexp(first_lse, second_lse)
    out, lse = merge_triton.merge_two((first.clone(), first_lse.clone()), (second, second_lse), torch.float32)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[2], second[2])
    assert torch.equal(out[4], first[4])
    assert torch.equal(out[5], first[5])
    assert torch.equal(out[6], second[6])


def test_non_contiguous_parts(merge_triton: ModuleType) -> None:
    parts = make_partials(2, (9, 4, 16), torch.float32)
    expected, _ = merge.merge_partials(parts, torch.float32)
    strided = [(out.transpose(0, 1).contiguous().transpose(0, 1), lse.T.contiguous().T) for out, lse in parts]
    assert not any(tensor.is_contiguous() for part in strided for tensor in part)
    found, _ = merge_triton.merge_two(*strided, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
