"""One rule for all backends: which kernels `torch.use_deterministic_algorithms` selects, and what the CPU repeats."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from stand_in_flash_attn import FlashAttention2, FlashAttention4
from stand_in_flash_attn_3 import FlashAttention3, FlashAttention3Of2025
from stand_in_kernels import module_like
from stand_in_xformers import Xformers

from kvpref.ops.attention import AttentionParams, VarlenBlock, get_backend
from kvpref.ops.attention.backends import determinism, optional_package
from kvpref.ops.attention.backends.optional_package import OptionalPackage
from kvpref.ops.attention.backends.packaged import PackagedBackend
from kvpref.prefix.blocks import VarlenLayout

PARAMS = AttentionParams(scale=0.5)
MODES: dict[str, dict[str, bool]] = {
    "off": {"mode": False},
    "on": {"mode": True},
    "warn only": {"mode": True, "warn_only": True},
}
FLAGGED: dict[str, tuple[str, str, Callable[[], object]]] = {
    "flash_attn": ("flash_attn", "flash_attn.flash_attn_interface", FlashAttention2),
    "flash_attn_3": ("flash_attn_3", "flash_attn_interface", FlashAttention3),
    "flash_attn_3 of 2025": ("flash_attn_3", "flash_attn_interface", FlashAttention3Of2025),
    "flash_attn_4": ("flash_attn_4", "flash_attn.cute.interface", FlashAttention4),
}


class FakeQuery:
    """A query on a device that this machine does not have."""

    device, dtype = torch.device("cuda", 0), torch.bfloat16

    def __init__(self, head_dim: int = 64) -> None:
        self.shape = torch.Size((5, 4, head_dim))


@pytest.fixture(autouse=True)
def first_warning() -> Iterator[None]:
    determinism._warn.cache_clear()
    yield
    torch.use_deterministic_algorithms(False)
    determinism._warn.cache_clear()


def block_of(q: tuple[int, ...], k: tuple[int, ...], causal: bool = False) -> VarlenBlock:
    return VarlenBlock.from_layout(
        VarlenLayout(cu_seqlens_q=q, cu_seqlens_k=k, shape="causal" if causal else "rectangle")
    )


def run_backward(name: str, times: int = 2) -> list[str]:
    """The warnings of some backward passes."""
    backend, block, q = get_backend(name), block_of((0, 2), (0, 2), True), torch.ones(2, 1, 8, dtype=torch.float64)
    out, lse = backend.forward(q, q, q, block, PARAMS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            backend.backward(q, q, q, q, out, lse, block, PARAMS)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("package", FLAGGED)
def test_packages_with_both_kinds_of_kernels(monkeypatch: pytest.MonkeyPatch, package: str, mode: str) -> None:
    name, module, kernels = FLAGGED[package]
    stand_in = kernels()
    optional_package._load.cache_clear()
    monkeypatch.setitem(sys.modules, module, module_like(stand_in))
    torch.use_deterministic_algorithms(**MODES[mode])
    said = run_backward(name)
    optional_package._load.cache_clear()
    assert stand_in.deterministic == [mode == "on"] * 2  # type: ignore[attr-defined]
    assert len(said) == (mode == "warn only"), said
    assert all(f"backend {name!r} runs a backward pass that is not deterministic" in line for line in said)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operator", ["fa2@2.8.3", "fa2@2.5.7-pt"], ids=["flash-attn", "PyTorch"])
def test_xformers_follows_whose_kernels_it_runs(monkeypatch: pytest.MonkeyPatch, operator: str, mode: str) -> None:
    """Over flash-attn its operator asks for the non-deterministic backward; over PyTorch the kernels decide."""
    kernels = Xformers()
    for direction in (kernels.flash.FwOp, kernels.flash.BwOp):
        monkeypatch.setattr(direction, "NAME", operator)
    monkeypatch.setattr(OptionalPackage, "load", lambda self: kernels)
    serve(monkeypatch, (9, 0))
    torch.use_deterministic_algorithms(**MODES[mode])
    reason = get_backend("xformers").unsupported_reason(FakeQuery())  # type: ignore[arg-type]
    over_flash_attn = operator == "fa2@2.8.3"
    if mode == "on" and over_flash_attn:
        assert reason is not None
        assert "operator fa2@2.8.3 has no deterministic backward" in reason
    else:
        assert reason is None
        assert len(run_backward("xformers")) == (mode == "warn only" and over_flash_attn)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "head_dim", "capability", "reason"),
    [
        ("cuda_flash", 256, (9, 0), None),
        ("efficient", 256, (9, 0), None),
        ("flash_attn", 256, (9, 0), None),
        ("flash_attn_3", 192, (9, 0), None),
        ("flash_attn_3", 200, (9, 0), "no deterministic backward for head dims above 192, got 200"),
        ("flash_attn_3", 256, (9, 0), "no deterministic backward for head dims above 192, got 256"),
        ("flash_attn_4", 128, (9, 0), None),
        ("flash_attn_4", 128, (10, 0), None),
        ("flash_attn_4", 128, (12, 0), "no deterministic backward on compute capability 12.0"),
    ],
)
def test_what_cannot_repeat_itself_refuses_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    head_dim: int,
    capability: tuple[int, int],
    reason: str | None,
    mode: str,
) -> None:
    serve(monkeypatch, capability)
    torch.use_deterministic_algorithms(**MODES[mode])
    found = get_backend(name).unsupported_reason(FakeQuery(head_dim))  # type: ignore[arg-type]
    assert found is None if reason is None or mode != "on" else reason in str(found)


def serve(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A device with every package, whose kernels run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(OptionalPackage, "missing_reason", lambda self: None)
    monkeypatch.setattr(PackagedBackend, "probe_failure", lambda self, *args: None)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


BLOCKS = {
    "short": ((0, 12, 40), (0, 30, 50), False),
    "more keys than a kernel's block": ((0, 80, 330), (0, 600, 1300), False),
    "long self": ((0, 70, 800), (0, 70, 800), True),
}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
@pytest.mark.parametrize("block_name", BLOCKS)
def test_the_cpu_gives_the_same_bits(block_name: str, backend: str) -> None:
    """`cpu_flash` works on up to 512 keys and 256 queries at a time; its sums go over several such blocks here."""
    cu_q, cu_k, causal = BLOCKS[block_name]
    block, generator = block_of(cu_q, cu_k, causal), torch.Generator().manual_seed(0)
    q, dout = (torch.randn(cu_q[-1], 4, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(cu_k[-1], 2, 16, generator=generator) for _ in range(2))
    first, second = (get_backend(backend).forward(q, k, v, block, PARAMS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    grads = [get_backend(backend).backward(dout, q, k, v, *first, block, PARAMS) for _ in range(3)]
    assert all(torch.equal(a, b) for again in grads[1:] for a, b in zip(grads[0], again, strict=True))
