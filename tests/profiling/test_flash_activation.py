"""`kvpref doctor` on the activation of other kernels in PyTorch's flash attention operator."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvpref.ops.attention.backends.optional_package import OptionalPackage
from kvpref.profiling.flash_activation import activation_warnings, values_returned, values_taken


def two_values(q: Any, *, return_lse: bool = False) -> tuple[Any, Any]:
    """flash-attn-4 until its beta 18."""
    if q is None:
        return None, None
    return q, return_lse


def four_values(q: Any, *, return_lse: bool = False) -> tuple[Any, ...]:
    """Since its beta 19; an early way out may still return two."""
    if q is None:
        return None, None
    return q, return_lse, None, None


def one_value(q: Any) -> Any:
    return two_values(q)


def install(monkeypatch: pytest.MonkeyPatch, forward: Callable[..., Any]) -> None:
    """flash-attn-4 with this forward function."""
    module = types.SimpleNamespace(_flash_attn_fwd=forward)
    monkeypatch.setattr(OptionalPackage, "missing_reason", lambda self: None)
    monkeypatch.setattr(OptionalPackage, "load", lambda self: module)
    monkeypatch.setattr(OptionalPackage, "name_and_version", lambda self: "flash-attn-4 4.0.0b27")


def unpacks_two(module: Any, query: Any) -> Any:
    out, lse = module._flash_attn_fwd(query)
    return out, lse


def unpacks_any(module: Any, query: Any) -> Any:
    out, lse, *_ = module._flash_attn_fwd(query)
    return out, lse


def test_values_are_counted() -> None:
    assert [values_returned(function) for function in (two_values, four_values, one_value, len)] == [2, 4, None, None]


def test_the_installed_pytorch_is_read() -> None:
    """Two values until PyTorch 2.13, then any number."""
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    assert values_taken() == (2 if release < (2, 14) else None)


@pytest.mark.parametrize(
    ("caller", "forward", "is_named"),
    [
        (unpacks_two, four_values, True),
        (unpacks_two, two_values, False),
        (unpacks_any, four_values, False),
        (unpacks_two, one_value, False),
        (None, four_values, False),
    ],
)
def test_a_package_that_pytorch_cannot_take_is_named(
    monkeypatch: pytest.MonkeyPatch, caller: Callable[..., Any] | None, forward: Callable[..., Any], is_named: bool
) -> None:
    install(monkeypatch, forward)
    monkeypatch.setattr(torch.nn.attention._fa4, "_fa4_run_forward", caller)
    expected = [
        f'torch.nn.attention.activate_flash_attention_impl("FA4") does not work: torch {torch.__version__} takes 2 '
        "values from flash-attn-4 4.0.0b27, which returns 4; use kvpref's backend flash_attn_4, which needs no "
        "activation"
    ]
    assert activation_warnings() == (expected if is_named else [])


def test_without_the_package_nothing_is_said() -> None:
    assert activation_warnings() == []


def test_what_is_active_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
    assert [warning.split(" (")[0] for warning in activation_warnings()] == [
        "PyTorch's flash attention operator runs FA3 in this process"
    ]
