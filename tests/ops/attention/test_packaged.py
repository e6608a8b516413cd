"""A tiny call tells whether a package's kernels run, before a run is begun with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from stand_in_flash_attn_3 import FlashAttention3
from stand_in_kernels import module_like
from stand_in_xformers import Xformers
from torch._subclasses import FakeTensorMode

from kvpref.ops.attention import AttentionParams, VarlenBlock, get_backend
from kvpref.ops.attention.backends import flash_kernels, optional_package, packaged
from kvpref.ops.attention.backends.interface import Needs
from kvpref.ops.attention.backends.optional_package import OptionalPackage
from kvpref.ops.attention.backends.packaged import PackagedBackend
from kvpref.ops.attention.backends.reference import Reference
from kvpref.profiling import backend_probe
from kvpref.profiling.automatic import NO_MEMORY

XFORMERS_REFUSAL = """Operator `memory_efficient_attention` does not support inputs:
     query       : shape=(1, 5, 2, 2, 64) (torch.bfloat16)
     key         : shape=(1, 9, 2, 2, 64) (torch.bfloat16)
     value       : shape=(1, 9, 2, 2, 64) (torch.bfloat16)
     attn_bias   : <class 'xformers.ops.fmha.attn_bias.BlockDiagonalMask'>
     p           : 0.0
`fa2F@2.8.3-pt` is not supported because:
    xFormers wasn't build with CUDA support"""


@pytest.fixture(autouse=True)
def fresh_calls() -> Iterator[None]:
    packaged._probe_failure.cache_clear()
    optional_package._load.cache_clear()
    yield
    packaged._probe_failure.cache_clear()
    optional_package._load.cache_clear()


@pytest.fixture
def cpu_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a device that the kernels take, and no package is missing."""
    monkeypatch.setattr(flash_kernels, "refusal", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(OptionalPackage, "missing_reason", lambda self: None)


def query(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(5, 4, head_dim, dtype=dtype)


@pytest.mark.usefixtures("cpu_serves")
def test_xformers_of_another_cuda_is_refused_with_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it is available and then refuses every input."""

    class BuiltForAnotherCuda(Xformers):
        def memory_efficient_attention_partial(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError(XFORMERS_REFUSAL)

    kernels = BuiltForAnotherCuda()
    assert kernels.flash.FwOp.is_available()
    monkeypatch.setattr(OptionalPackage, "load", lambda self: kernels)
    monkeypatch.setattr(optional_package, "_installed_version", lambda distribution: "0.0.35")
    reason = get_backend("xformers").unsupported_reason(query())
    assert reason is not None
    assert "\n" not in reason
    for part in (
        "a tiny call on cpu failed (ValueError: Operator `memory_efficient_attention` does not support inputs",
        "xFormers wasn't build with CUDA support",
        f"with xformers 0.0.35, torch {torch.__version__}, CUDA ",
        'install a build for these (pip install "kvpref[xformers]"), or choose another backend',
    ):
        assert part in reason


@pytest.mark.usefixtures("cpu_serves")
def test_one_that_works_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Xformers()
    monkeypatch.setattr(OptionalPackage, "load", lambda self: kernels)
    assert get_backend("xformers").unsupported_reason(query()) is None


@pytest.mark.usefixtures("cpu_serves")
def test_a_build_without_a_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class ForwardOnly(FlashAttention3):
        def _flash_attn_backward(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("This flash attention build does not support backward.")

    monkeypatch.setitem(sys.modules, "flash_attn_interface", module_like(ForwardOnly()))
    reason = get_backend("flash_attn_3").unsupported_reason(query())
    assert "(RuntimeError: This flash attention build does not support backward.)" in str(reason)


@pytest.mark.usefixtures("cpu_serves")
def test_memory_that_ran_out_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full device says nothing about the kernels: the step fails, and the next one asks again."""
    has_memory = False

    class Crowded(FlashAttention3):
        def _flash_attn_forward(self, *args: Any, **kwargs: Any) -> Any:
            if not has_memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super()._flash_attn_forward(*args, **kwargs)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", module_like(Crowded()))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            get_backend("flash_attn_3").unsupported_reason(query())
    assert backend_probe._served_dtypes("flash_attn_3", "cpu") == ([], NO_MEMORY)
    has_memory = True
    assert get_backend("flash_attn_3").unsupported_reason(query()) is None


def test_cpu_tensors_are_refused_without_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptionalPackage, "missing_reason", lambda self: None)
    monkeypatch.setattr(PackagedBackend, "probe_failure", lambda self, *args: pytest.fail("called"))
    for name in ("flash_attn", "flash_attn_3", "flash_attn_4", "xformers"):
        assert "CUDA tensors only" in str(get_backend(name).unsupported_reason(query()))


class Recorder(PackagedBackend, Reference):
    """Kernels that write down how they were called."""

    name = "recorder"
    package = OptionalPackage(module="recorder", distribution="recorder", install="pip install recorder")

    def __init__(self) -> None:
        self.queries: list[tuple[torch.dtype, int]] = []
        self.directions: list[str] = []

    def refusal(self, query: torch.Tensor, needs: Needs) -> str | None:
        return self.probe_failure(query, needs)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: VarlenBlock, params: AttentionParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for tensor in (q, k, v, block.cu_seqlens_q):
            assert type(tensor) is torch.Tensor, "fake"
            assert not tensor.is_inference()
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        self.queries.append((q.dtype, q.shape[-1]))
        self.directions.append("forward")
        return Reference.forward(self, q, k, v, block, params)

    def backward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.directions.append("backward")
        return Reference.backward(self, *args)


def test_the_call_is_real_in_every_mode() -> None:
    recorder = Recorder()
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert recorder.unsupported_reason(query()) is None
        assert type(torch.ones(1)) is not torch.Tensor, "the caller's tensors stay fake"
    assert recorder.directions == ["forward", "backward"] * 2, "self and cross"


def test_the_call_runs_on_the_device_of_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that ask for the current device would run elsewhere: a reference model on a second GPU."""
    inside: list[torch.device] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        inside.append(tensor.device)
        yield
        inside.pop()

    class Checker(Recorder):
        def forward(self, q: torch.Tensor, *args: Any) -> Any:
            assert inside == [q.device]
            return super().forward(q, *args)

        def backward(self, dout: torch.Tensor, *args: Any) -> Any:
            assert inside == [dout.device]
            return super().backward(dout, *args)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    assert Checker().unsupported_reason(query()) is None


def test_it_is_made_once_per_kind_of_query() -> None:
    recorder = Recorder()
    for _ in range(3):
        for kind in (query(), query(128), query(dtype=torch.float16)):
            recorder.unsupported_reason(kind)
    assert recorder.queries[::2] == [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 64)]
    torch.use_deterministic_algorithms(True)
    try:
        recorder.unsupported_reason(query())
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(recorder.queries) == 8, "deterministic kernels are others"
    recorder.unsupported_reason(query(), Needs(value_head_dim=192, softcap=True))
    assert recorder.queries[8:] == [(torch.bfloat16, 192)] * 2, "as are those with a softcap or for wider values"
