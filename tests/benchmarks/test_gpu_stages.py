"""What stages of the GPU run make of what they see, where it takes no GPU to know."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the GPU run by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def stage(name: str) -> ModuleType:
        import importlib

        return importlib.import_module(f"gpu_run.{name}")

    return stage


@pytest.mark.parametrize(
    ("out", "status", "reason"),
    [
        ("ran to its end\n========= ERROR SUMMARY: 0 errors\n", "passed", None),
        (
            "========= Invalid __global__ write of size 4 bytes\nran to its end\n========= ERROR SUMMARY: 3 errors\n",
            "failed",
            "Invalid __global__ write of size 4 bytes",
        ),
        ("========= ERROR SUMMARY: 0 errors\n", "failed", "exit code 1: ========= ERROR SUMMARY: 0 errors"),
        ("no such option\n", "failed", "exit code 1: no such option"),
    ],
)
def test_reports_of_the_memory_checker(stage: Any, out: str, status: str, reason: str | None) -> None:
    code = 0 if "ran" in out else 1
    finding = stage("stage_memcheck").read_report(subprocess.CompletedProcess([], code, out, ""))
    assert (finding.status, finding.reason) == (status, reason)


def test_synchronisations_are_counted_by_place(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with stage("stage_steps").counted_synchronisations() as places:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert list(places.values()) == [2]
    assert next(iter(places)).startswith("tests/benchmarks/test_gpu_stages.py:")
    assert modes == ["warn", "default"]


def test_the_far_shape_passes_the_bound_well(stage: Any) -> None:
    far = stage("stage_far_rows")
    shape = far.FULL
    row_elements = shape.heads * shape.head_dim
    assert shape.first_far_pair * shape.queries * row_elements >= 2**31
    assert (shape.first_far_pair - 1) * shape.queries * row_elements < 2**31
    assert shape.num_pairs - shape.first_far_pair > 30
    # The query and what has its size, twice its gradient's buffer in fp32, K/V per query head: in 80 GB with room.
    sized = shape.num_pairs * shape.queries * row_elements * 2
    assert 12 * sized + 10 * shape.canary_bytes < 70e9


def test_a_harmed_canary_or_pair_fails_the_row(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import options

    far = stage("stage_far_rows")
    dry = options.SweepOptions(device=torch.device("cpu"), gpu_rows=True, dry_run=True)
    row = far.rows(dry)["cpu_flash and prefixes"]
    assert row().status == "passed"
    original = far._whole_call

    def harmful(shape: Any, backend: str, across: bool, options: Any, canaries: list[torch.Tensor]) -> Any:
        results = original(shape, backend, across, options, canaries)
        canaries[1][3] = 0
        results.found[3][-1] += 1  # dv of the last row
        return results

    monkeypatch.setattr(far, "_whole_call", harmful)
    finding = row()
    assert finding.status == "failed"
    assert "pair 5: dv" in finding.reason
    assert "1 canaries were written over" in finding.reason


def test_a_wrong_kernel_fails_its_row(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import options

    from kvpref.ops.attention.backends.cpu_flash import CpuFlash

    kernels = stage("stage_kernels")
    dry = options.SweepOptions(device=torch.device("cpu"), gpu_rows=True, dry_run=True)
    row = next(iter(kernels.rows(dry).values()))
    original = CpuFlash.backward

    def wrong(self: Any, *args: Any) -> Any:
        dq, dk, dv = original(self, *args)
        return dq, dk * 1.001, dv

    monkeypatch.setattr(CpuFlash, "backward", wrong)
    finding = row()
    assert finding.status == "failed"
    assert finding.reason.startswith("dk 1.0e-03, naive ")


def test_a_row_that_raises_has_failed(stage: Any) -> None:
    def row() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    finding = stage("job").run_row(row)
    assert finding.status == "failed"
    assert finding.reason == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_pytest_outcomes_become_rows(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = stage("stage_tests")
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    monkeypatch.setattr(tests, "ELSEWHERE", ())
    monkeypatch.setattr(tests, "FOLDER", "gpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpu").mkdir()
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    gpu: x\n    full: x\naddopts = --import-mode=importlib\n"
    )
    (tmp_path / "gpu" / "test_made_up.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "@pytest.mark.parametrize('n', [1, 2, 3])\n"
        "def test_numbers(n):\n    assert n < 3, 'too large'\n"
        "def test_skips():\n    pytest.skip('no wheel')\n"
    )
    (tmp_path / "gpu" / "test_lacks.py").write_text("import no_such_package\n")
    import options

    rows = tests.rows(options.SweepOptions(device=torch.device("cpu")))
    found = {name: run() for name, run in rows.items()}
    numbers = found["test_made_up.py::test_numbers"]
    assert numbers.status == "failed"
    assert {name: figure.value for name, figure in numbers.figures.items()} == {"passed": 2, "failed": 1}
    assert numbers.reason == "test_numbers[3]: AssertionError: too large"
    assert (found["test_made_up.py::test_skips"].status, found["test_made_up.py::test_skips"].reason) == (
        "skipped",
        "Skipped: no wheel",
    )
    assert found["test_lacks.py"].status == "skipped"
    assert "no_such_package" in found["test_lacks.py"].reason


@pytest.mark.parametrize(
    ("off", "status"), [(0.0, "passed"), (0.019, "passed"), (0.021, "failed"), (float("nan"), "failed")]
)
def test_models_are_held_to_twice_the_naive_error(stage: Any, off: float, status: str) -> None:
    engine = stage("stage_engine")
    exact = {"token_logps": torch.ones(4, dtype=torch.float64), "a.weight": torch.ones(2, 2, dtype=torch.float64)}
    naive = {"token_logps": torch.full((4,), 1.01), "a.weight": torch.full((2, 2), 1.0078125, dtype=torch.bfloat16)}
    finding = engine._judge(exact | {"token_logps": torch.full((4,), 1 + off)}, engine.Truth(exact=exact, naive=naive))
    assert finding.status == status
    assert ("wrong: token_logps" in finding.reason) == (status == "failed")
