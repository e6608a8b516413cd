"""What `auto` takes on CUDA when packages are at hand, what it says of it, and how often it asks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvpref.errors import InputError
from kvpref.ops.attention import backends, select_backend
from kvpref.ops.attention.backends import choose_automatically, determinism, flash_kernels, get_backend, torch_flash
from kvpref.ops.attention.backends.optional_package import OptionalPackage
from kvpref.ops.attention.backends.packaged import PackagedBackend

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


class FakeQuery:
    """A query on a device that this machine does not have."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> None:
        self.dtype, self.shape = dtype, torch.Size((5, 4, head_dim))

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


@pytest.fixture(autouse=True)
def fresh_selections() -> Iterator[None]:
    backends._selected.clear()
    backends._announce.cache_clear()
    yield
    backends._selected.clear()
    torch.use_deterministic_algorithms(False)


def make_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *installed: str) -> None:
    """A CUDA device and the distributions that are there, with kernels that run."""

    def missing_reason(package: OptionalPackage) -> str | None:
        return None if package.distribution in installed else f"{package.distribution} is not installed"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(OptionalPackage, "missing_reason", missing_reason)
    monkeypatch.setattr(OptionalPackage, "name_and_version", lambda package: f"{package.distribution} 3.0.0")
    monkeypatch.setattr(PackagedBackend, "probe_failure", lambda self, *args: None)


def activate(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: name)


def auto(query: Any) -> str:
    return select_backend("auto", query).name


ALL = ("flash-attn", "flash-attn-3", "flash-attn-4", "xformers")


@pytest.mark.parametrize(
    ("capability", "installed", "query", "expected"),
    [
        (HOPPER, ALL, FakeQuery(), "flash_attn_3"),
        (HOPPER, ALL, FakeQuery(torch.float16, 256), "flash_attn_3"),
        (HOPPER, ALL, FakeQuery(torch.float32), "efficient"),
        (HOPPER, ALL, FakeQuery(torch.float64), "tiled"),
        (HOPPER, ALL, FakeQuery(head_dim=60), "tiled"),
        (HOPPER, (), FakeQuery(), "cuda_flash"),
        (HOPPER, ("flash-attn", "flash-attn-4", "xformers"), FakeQuery(), "cuda_flash"),
        (AMPERE, ALL, FakeQuery(), "cuda_flash"),
        (BLACKWELL, ALL, FakeQuery(), "cuda_flash"),
    ],
)
def test_hopper_takes_flash_attention_3_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: tuple[str, ...],
    query: FakeQuery,
    expected: str,
) -> None:
    make_device(monkeypatch, capability, *installed)
    assert auto(query) == expected


def test_naming_flash_attention_2_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    make_device(monkeypatch, HOPPER, *ALL)
    query: Any = FakeQuery()
    assert select_backend("cuda_flash", query).name == "cuda_flash"
    assert str(choose_automatically(query)) == (
        'flash_attn_3 (flash-attn-3 3.0.0); backend="cuda_flash" keeps PyTorch\'s FlashAttention-2'
    )


def test_what_does_not_repeat_itself_is_passed_over_while_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selections are kept, and told apart by all that they depend on."""
    make_device(monkeypatch, HOPPER, *ALL)
    wide: Any = FakeQuery(head_dim=256)
    assert [auto(wide), auto(FakeQuery())] == ["flash_attn_3", "flash_attn_3"]
    torch.use_deterministic_algorithms(True)
    assert [auto(wide), auto(FakeQuery())] == ["cuda_flash", "flash_attn_3"]
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert auto(wide) == "flash_attn_3"
    activate(monkeypatch, "FA4")
    assert auto(FakeQuery()) == "flash_attn_4"


def test_a_package_whose_kernels_fail_is_passed_over_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    make_device(monkeypatch, HOPPER, *ALL)
    monkeypatch.setattr(PackagedBackend, "probe_failure", lambda self, *args: "a tiny call on cuda:0 failed (why)")
    query: Any = FakeQuery()
    assert auto(query) == "cuda_flash"
    assert str(choose_automatically(query)) == (
        f"cuda_flash (FlashAttention-2 of torch {torch.__version__}), not flash_attn_3: "
        "a tiny call on cuda:0 failed (why)"
    )


@pytest.mark.parametrize(
    ("activated", "capability", "expected"),
    [
        ("FA3", HOPPER, "flash_attn_3"),
        ("FA4", HOPPER, "flash_attn_4"),
        ("FA4", BLACKWELL, "flash_attn_4"),
        ("FA3", BLACKWELL, "efficient"),
        ("another", AMPERE, "efficient"),
        ("another", HOPPER, "flash_attn_3"),
    ],
)
def test_what_was_activated_in_pytorch_runs_under_its_own_name(
    monkeypatch: pytest.MonkeyPatch, activated: str, capability: tuple[int, int], expected: str
) -> None:
    """`cuda_flash` is FlashAttention-2 or nothing: its operator would run the other kernels."""
    make_device(monkeypatch, capability, "flash-attn-3", "flash-attn-4")
    query: Any = FakeQuery()
    select_backend("cuda_flash", query)
    activate(monkeypatch, activated)
    assert auto(query) == expected
    with pytest.raises(InputError, match=f"operator runs {activated} in this process .* not FlashAttention-2; .*rest"):
        select_backend("cuda_flash", query)


def test_activation_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real registry, with an implementation that replaces nothing."""

    class Handle:
        def remove(self) -> None: ...

    monkeypatch.setattr(torch.nn.attention._registry, "_FLASH_ATTENTION_IMPLS", {})
    torch.nn.attention.register_flash_attention_impl("FA3", register_fn=Handle)
    monkeypatch.setattr(flash_kernels, "refusal", lambda *args: None)
    assert get_backend("cuda_flash").unsupported_reason(torch.empty(1, 1, 8)) is None
    torch.nn.attention.activate_flash_attention_impl("FA3")
    try:
        reason = get_backend("cuda_flash").unsupported_reason(torch.empty(1, 1, 8))
        assert torch_flash.backend_of_activated() == "flash_attn_3"
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert "choose backend 'flash_attn_3', or call torch.nn.attention.restore" in str(reason)
    assert torch_flash.activated() is None


def test_xformers_over_pytorchs_operator_is_refused_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from stand_in_xformers import Xformers

    make_device(monkeypatch, HOPPER, *ALL)
    kernels, query = Xformers(), FakeQuery()
    monkeypatch.setattr(OptionalPackage, "load", lambda self: kernels)
    activate(monkeypatch, "FA3")
    xformers = get_backend("xformers")
    assert "operator runs FA3" in str(xformers.unsupported_reason(query))  # type: ignore[arg-type]
    monkeypatch.setattr(kernels.flash.FwOp, "NAME", "fa2F@2.8.3")
    assert xformers.unsupported_reason(query) is None  # type: ignore[arg-type]


def test_the_log_says_it_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    make_device(monkeypatch, HOPPER, *ALL)
    with caplog.at_level(logging.INFO, "kvpref.attention"):
        for _ in range(3):
            auto(FakeQuery())
            auto(torch.empty(1, 1, 8))
        select_backend("reference", torch.empty(1, 1, 8))
    assert [record.getMessage() for record in caplog.records] == [
        "attention on NVIDIA H100 80GB HBM3 in bfloat16: auto takes flash_attn_3 (flash-attn-3 3.0.0); "
        'backend="cuda_flash" keeps PyTorch\'s FlashAttention-2',
        f"attention on cpu in float32: auto takes cpu_flash (torch {torch.__version__})",
    ]


def test_layers_do_not_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    make_device(monkeypatch, HOPPER, *ALL)
    asked = []
    for name in ("flash_attn_3", "cuda_flash"):
        backend = get_backend(name)
        ask = type(backend).unsupported_reason
        monkeypatch.setattr(
            type(backend),
            "unsupported_reason",
            lambda self, *args, ask=ask: asked.append(self.name) or ask(self, *args),
        )
    for _ in range(50):
        auto(FakeQuery())
        select_backend("cuda_flash", FakeQuery())  # type: ignore[arg-type]
    assert asked == ["flash_attn_3", "cuda_flash"]


def test_warn_only_is_not_required() -> None:
    assert not determinism.is_required()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert not determinism.is_required()
    torch.use_deterministic_algorithms(True)
    assert determinism.is_required()
