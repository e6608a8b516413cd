"""`kvpref doctor`: what it finds here, and what it says of machines that are worse off."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from command_line import Run
from typer.testing import CliRunner

from kvpref.cli.app import app
from kvpref.ops.attention import get_backend
from kvpref.ops.attention.backends.cpu_flash import CpuFlash
from kvpref.profiling import automatic, environment
from kvpref.profiling.automatic import DeviceChoice
from kvpref.profiling.backend_probe import BackendProbe, probe_backends

REFERENCE = BackendProbe(name="reference", device="cpu", errors={"float32": 1e-7}, reason=None)


def run_doctor(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor", *arguments])
    return result.exit_code, result.output


def probes() -> dict[str, BackendProbe]:
    return {probe.name: probe for probe in probe_backends()}


def test_this_machine(kvpref_command: Run) -> None:
    done = kvpref_command("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    backends = {backend["name"]: backend for backend in found["backends"]}
    assert backends["cpu_flash"]["works"]
    assert 0 < backends["cpu_flash"]["errors"]["float32"] < 1e-5
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["has_fast_backend"]
    assert {device["kind"] for device in found["devices"]} >= {"cpu"}
    assert all(device["memory_bytes"] > 2**30 for device in found["devices"])
    assert found["automatic"][-1]["device"] == "cpu"
    takes = f"auto on cpu in bfloat16, float16, float32: cpu_flash (torch {torch.__version__})"
    for line in ("cpu_flash", "yes, on cpu", "versions: Python", "threads: 1 per operation", takes):
        assert line in done.stdout


def test_help_has_an_example(kvpref_command: Run) -> None:
    assert "Example: kvpref doctor" in kvpref_command("doctor", "--help").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a CUDA device")
def test_backends_that_need_a_gpu_say_so() -> None:
    found = probes()
    for name in ("cuda_flash", "efficient", "flash_attn", "flash_attn_3", "flash_attn_4", "xformers"):
        assert not found[name].works
        assert "CUDA tensors only" in str(found[name].reason)
        assert "no CUDA device" in str(found[name].reason)
    for name in ("tiled", "reference"):
        assert found[name].works
        assert not found[name].is_fast


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    right = getattr(CpuFlash, part)

    def wrong(*args: Any) -> tuple[torch.Tensor, ...]:
        *first, last = right(*args)
        return *first, 1.001 * last

    monkeypatch.setattr(CpuFlash, part, wrong)
    probe = probes()["cpu_flash"]
    assert not probe.works
    assert probe.errors == {}
    # One part in a thousand, somewhat more where a wrong log-sum-exp spreads to the gradients.
    assert re.search(r"wrong in float32: relative error \d\.\de-03, rounding explains 1e-05", str(probe.reason))


def test_failing_kernels_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(CpuFlash, "backward", fail)
    probe = probes()["cpu_flash"]
    assert probe.reason == "it failed in float32: RuntimeError: no kernel image is available"


def test_without_a_fast_backend_the_exit_code_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = BackendProbe(name="cpu_flash", device="cpu", errors={}, reason="it failed in float32: [Errno 5] broken")
    monkeypatch.setattr(environment, "probe_backends", lambda: [broken, REFERENCE])
    code, output = run_doctor("--json")
    assert code == 1
    assert "no fast attention backend works here" in output
    assert "[Errno 5] broken" in output, "brackets are text, not markup"
    found = json.loads(output.splitlines()[-1])
    assert not found["has_fast_backend"]
    assert [backend["works"] for backend in found["backends"]] == [False, True]


def test_what_auto_takes_on_hopper_and_why_not_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [
        DeviceChoice(device="NVIDIA H100", dtypes=("bfloat16", "float16"), takes="cuda_flash, not flash_attn_3: why"),
        DeviceChoice(device="NVIDIA H100", dtypes=("float32",), takes="efficient (torch 2.13.0)"),
    ]
    monkeypatch.setattr(environment, "automatic_choices", lambda: pair)
    _, output = run_doctor("--json")
    assert "auto on NVIDIA H100 in bfloat16, float16: cuda_flash, not flash_attn_3: why\n" in output
    assert "auto on NVIDIA H100 in float32: efficient (torch 2.13.0)\n" in output
    assert json.loads(output.splitlines()[-1])["automatic"][0]["dtypes"] == ["bfloat16", "float16"]


def test_choices_are_told_for_each_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal GPUs, on which kernels for 16 bits take a package's place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: (dtype, device))

    def choose(query: tuple[torch.dtype, torch.device]) -> str:
        dtype, device = query
        return "cpu_flash" if device.type == "cpu" else "efficient" if dtype == torch.float32 else "flash_attn_3"

    monkeypatch.setattr(automatic, "choose_automatically", choose)
    assert [(choice.device, choice.dtypes, choice.takes) for choice in automatic.automatic_choices()] == [
        ("NVIDIA H100", ("bfloat16", "float16"), "flash_attn_3"),
        ("NVIDIA H100", ("float32",), "efficient"),
        ("cpu", ("bfloat16", "float16", "float32"), "cpu_flash"),
    ]


def test_costs_are_told_of_backends_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    works = BackendProbe(name="xformers", device="cuda", errors={"bfloat16": 1e-3}, reason=None, cost="copies keys")
    broken = BackendProbe(name="efficient", device="cuda", errors={}, reason="it failed", cost="copies values")
    monkeypatch.setattr(environment, "probe_backends", lambda: [works, broken])
    _, output = run_doctor()
    assert "bfloat16 1.0e-03; copies keys" in output
    assert "copies values" not in output


@pytest.mark.parametrize("name", ["xformers", "efficient"])
def test_copies_per_query_head_are_a_cost(name: str) -> None:
    assert "2 x keys x heads x head dim numbers" in str(get_backend(name).cost)


def test_warnings_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    monkeypatch.setattr(environment, "_installed", lambda package: "2.9.1" if package == "torch" else None)
    monkeypatch.setattr(environment, "_nvidia_gpu_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    code, output = run_doctor()
    assert code == 0
    for text in (
        "warning: torch 2.9.1: kvpref is tested with 2.11 to 2.13; pip install",
        "warning: transformers is not installed: kvpref is tested with 5.17 to 5.23; pip install",
        "warning: the machine has an NVIDIA GPU, but torch",
        "warning: OMP_NUM_THREADS=4096 is more than the",
        "not installed: kvpref, transformers,",
    ):
        assert text in output


@pytest.mark.parametrize(
    ("torch_version", "is_supported"),
    [("2.10.0", False), ("2.11.0", True), ("2.13.1+cu130", True), ("2.14.0.dev20261101", False), ("3.0", False)],
)
def test_version_range(torch_version: str, is_supported: bool) -> None:
    warnings = environment.version_warnings({"torch": torch_version, "transformers": "5.23.2"})
    assert (warnings == []) == is_supported
    assert all('pip install "torch>=2.11,<2.14"' in warning for warning in warnings)


@pytest.mark.parametrize(("value", "num_warnings"), [("2", 0), ("3", 1), ("8,2", 1), ("", 0), ("many", 0), (None, 0)])
def test_thread_warnings(value: str | None, num_warnings: int) -> None:
    variables = {} if value is None else {"OMP_NUM_THREADS": value}
    assert len(environment.thread_warnings(variables, num_cpus=2)) == num_warnings


def test_gpu_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.gpu_warnings(has_gpu=False) == []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "check the driver" in environment.gpu_warnings(has_gpu=True)[0]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA; install a CUDA build" in environment.gpu_warnings(has_gpu=True)[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment.gpu_warnings(has_gpu=True) == []
