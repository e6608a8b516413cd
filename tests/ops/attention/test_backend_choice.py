"""Which backend serves a query, and what the others answer: device, dtype, head dim, package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvpref.ops.attention import available_backends, backends, get_backend, select_backend
from kvpref.ops.attention.backends import backend_names, optional_package
from kvpref.ops.attention.backends.optional_package import OptionalPackage
from kvpref.ops.attention.backends.packaged import PackagedBackend

PACKAGED = ("flash_attn", "flash_attn_3", "flash_attn_4", "xformers")


class FakeQuery:
    """A query on a device that this machine may not have."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> None:
        self.device, self.dtype, self.shape = torch.device("cuda", 0), dtype, torch.Size((5, 4, head_dim))


@pytest.fixture
def fresh_imports() -> Iterator[None]:
    optional_package._load.cache_clear()
    optional_package._installed_version.cache_clear()
    yield
    optional_package._load.cache_clear()
    optional_package._installed_version.cache_clear()


def on_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.fixture(autouse=True)
def fresh_selections() -> None:
    """What was selected for a device that a test has invented."""
    backends._selected.clear()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package, with kernels that run."""
    monkeypatch.setattr(OptionalPackage, "missing_reason", lambda self: None)
    monkeypatch.setattr(PackagedBackend, "probe_failure", lambda self, *args: None)


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        (torch.bfloat16, (8, 0), "cuda_flash"),
        (torch.float16, (8, 9), "cuda_flash"),
        (torch.bfloat16, (10, 0), "cuda_flash"),
        (torch.float32, (8, 0), "efficient"),
        (torch.float32, (9, 0), "efficient"),
        (torch.float16, (7, 5), "efficient"),
        (torch.float64, (9, 0), "tiled"),
    ],
    ids=str,
)
def test_auto_on_cuda_without_an_import(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: tuple[int, int], expected: str
) -> None:
    on_device(monkeypatch, capability)
    query = FakeQuery()
    query.dtype = dtype
    # A tensor's method that backends in plain torch ask.
    query.is_floating_point = lambda: True  # type: ignore[attr-defined]

    def refuse(package: OptionalPackage) -> str:
        raise AssertionError(f"auto imported {package.module}")

    monkeypatch.setattr(OptionalPackage, "missing_reason", refuse)
    assert select_backend("auto", query).name == expected  # type: ignore[arg-type]


def test_auto_refuses_what_none_can_run() -> None:
    with pytest.raises(ValueError, match=r"no attention backend can run torch\.int64 on cpu"):
        select_backend("auto", torch.zeros(1, 1, 8, dtype=torch.int64))


@pytest.mark.parametrize("name", ["efficient", *PACKAGED])
def test_cpu_tensors_are_refused_without_an_import(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptionalPackage, "missing_reason", lambda self: pytest.fail("imported"))
    with pytest.raises(
        ValueError, match=rf"'{name}' cannot run here: .*CUDA.*'cpu'; these can: cpu_flash, tiled, reference"
    ):
        select_backend(name, torch.zeros(1, 1, 8))


def test_names() -> None:
    assert backend_names() == ("cpu_flash", "cuda_flash", "efficient", "tiled", "reference", *PACKAGED)
    assert available_backends(torch.zeros(1, 1, 8)) == ["cpu_flash", "tiled", "reference"]


@pytest.mark.parametrize(
    ("name", "query", "capability", "reason"),
    [
        *((name, FakeQuery(), (9, 0), None) for name in PACKAGED if name != "xformers"),
        *((name, FakeQuery(torch.float32), (9, 0), "float16 or bfloat16") for name in PACKAGED),
        *((name, FakeQuery(head_dim=60), (9, 0), "multiple of 8") for name in PACKAGED),
        *((name, FakeQuery(head_dim=264), (9, 0), "at most") for name in PACKAGED),
        *((name, FakeQuery(), (7, 5), "compute capability") for name in PACKAGED),
        ("flash_attn", FakeQuery(head_dim=256), (12, 0), None),
        ("flash_attn_3", FakeQuery(), (10, 0), "below 10.0, got 10.0"),
        ("flash_attn_4", FakeQuery(), (8, 9), "9.0 or later, got 8.9"),
        ("flash_attn_4", FakeQuery(), (10, 3), None),
        ("flash_attn_4", FakeQuery(head_dim=256), (9, 0), "at most 128"),
        ("efficient", FakeQuery(torch.float32, 4), (7, 0), None),
        ("efficient", FakeQuery(torch.float16, 8), (7, 0), None),
        ("efficient", FakeQuery(torch.float32, 6), (9, 0), "multiple of 4"),
        ("efficient", FakeQuery(torch.float16, 4), (9, 0), "multiple of 8"),
        ("efficient", FakeQuery(torch.bfloat16), (7, 5), "8.0"),
        ("efficient", FakeQuery(torch.float64), (9, 0), "float32, float16 or bfloat16"),
    ],
)
def test_what_each_can_do(
    monkeypatch: pytest.MonkeyPatch, name: str, query: FakeQuery, capability: tuple[int, int], reason: str | None
) -> None:
    on_device(monkeypatch, capability)
    install(monkeypatch)
    found = get_backend(name).unsupported_reason(query)  # type: ignore[arg-type]
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.usefixtures("fresh_imports")
@pytest.mark.parametrize(
    ("name", "module", "advice"),
    [
        ("flash_attn", "flash_attn", 'flash-attn is not installed; pip install "kvpref[flash-attn]"'),
        ("flash_attn_3", "flash_attn_interface", "flash-attn-3 is not installed; build it from the folder hopper"),
        ("flash_attn_4", "flash_attn", "flash-attn-4 is not installed; pip install --pre flash-attn-4"),
        ("xformers", "xformers", 'xformers is not installed; pip install "kvpref[xformers]"'),
    ],
)
def test_missing_packages_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, advice: str
) -> None:
    on_device(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, module, None)  # importing it now raises ModuleNotFoundError
    reason = get_backend(name).unsupported_reason(FakeQuery())  # type: ignore[arg-type]
    assert reason is not None
    assert reason.startswith(advice)
    with pytest.raises(ImportError, match="is not installed"):
        get_backend(name).package.load()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("fresh_imports")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "raise ImportError('undefined symbol: _ZN3c10\\nmore')",
            r"\(ImportError: undefined symbol: _ZN3c10\); reinst",
        ),
        ("import a_module_nobody_has", r"failed \(ModuleNotFoundError: No module named 'a_module_nobody_has'\)"),
        ("assert False, 'built for another torch'", r"failed \(AssertionError: built for another torch\); reinstall"),
    ],
)
def test_broken_packages_say_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, expected: str) -> None:
    (tmp_path / "broken_kernels.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    package = OptionalPackage(module="broken_kernels", distribution="broken-kernels", install="pip install it")
    with pytest.raises(ImportError, match=expected):
        package.load()


@pytest.mark.usefixtures("fresh_imports")
@pytest.mark.parametrize(
    ("installed", "refused"),
    [("2.6.3", True), ("2.7.0", False), ("2.7.4.post1", False), ("2.10.0", False), (None, False)],
)
def test_old_packages_are_refused(monkeypatch: pytest.MonkeyPatch, installed: str | None, refused: bool) -> None:
    package = get_backend("flash_attn").package  # type: ignore[attr-defined]
    monkeypatch.setattr(optional_package, "_installed_version", lambda distribution: installed)
    monkeypatch.setattr(optional_package, "_load", lambda module: sys)
    reason = package.missing_reason()
    assert (reason is not None) == refused
    if reason is not None:
        assert reason.startswith("it needs flash-attn 2.7.0 or later, got 2.6.3; pip install")


def test_xformers_without_its_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from stand_in_xformers import Xformers

    kernels = Xformers()
    monkeypatch.setattr(OptionalPackage, "load", lambda self: kernels)
    on_device(monkeypatch, (9, 0))
    install(monkeypatch)
    assert get_backend("xformers").unsupported_reason(FakeQuery()) is None  # type: ignore[arg-type]
    monkeypatch.setattr(kernels.flash.FwOp, "is_available", classmethod(lambda cls: False))
    reason = get_backend("xformers").unsupported_reason(FakeQuery())  # type: ignore[arg-type]
    assert reason is not None
    assert "without FlashAttention" in reason


def test_optional_packages_are_not_imported_with_kvpref() -> None:
    code = (
        "import sys\n"
        "import kvpref.ops.attention\n"
        "loaded = {'flash_attn', 'flash_attn_interface', 'xformers'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
