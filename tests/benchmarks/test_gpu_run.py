"""The GPU run: what breaks or hangs costs its own row, results are kept as they come, every stage runs dry."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

FAKE_WORKER = """
import json, os, signal, sys, time

NAMES = {names}

def send(event, **values):
    print(json.dumps({{"event": event, **values}}), flush=True)

def found(status):
    return {{"status": status, "figures": {{}}, "bar": None, "reason": None}}

for line in sys.stdin:
    job = json.loads(line)
    if NAMES[0] == "no device":
        send("refused", reason="torch sees no CUDA device")
    versions = dict.fromkeys(["torch_version", "transformers_version", "python_version", "date"], "1")
    send("about", about={{"gpu": "H", "pid": os.getpid(), **versions}})
    if NAMES[0] == "cannot start":
        sys.exit("no module named x")
    send("rows", names=NAMES)
    stop = None if job["count"] is None else job["start"] + job["count"]
    for name in NAMES[job["start"]:stop]:
        if name == "dies before it starts" and job["start"] > 0:
            os._exit(7)
        send("start", name=name)
        if name == "crashes":
            print("segmentation fault", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "dies in the middle of a word":
            print('{{"event": "row", "na', end="", flush=True)
            os._exit(1)
        if name == "hangs":
            time.sleep(60)
        status = "failed" if name == "has a CUDA error" else "passed"
        send("row", name=name, finding=found(status) | {{"reason": str(os.getpid())}})
        if name == "has a CUDA error":
            os._exit(3)
    send("done")
"""

ABSENT = ("datasets", "trl", "peft", "matplotlib", "accelerate", "tokenizers", "rich", "kvpref.data", "kvpref.training")
NEED_A_DEVICE = {"memcheck", "tests"}

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The table of stages."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_run import stages

    return stages


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run stages whose rows are called what they do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_run.driver import Driver
    from gpu_run.results import Results
    from gpu_run.stages import Stage

    def run(
        names: list[str],
        *,
        limit_s: float = 30,
        row_limit_s: float = 30,
        count: int = 1,
        dry_run: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        script = tmp_path / "worker.py"
        script.write_text(FAKE_WORKER.format(names=names))
        stages = tuple(
            Stage(name=f"stage {number}", title="", limit_s=limit_s, row_limit_s=row_limit_s, **options)
            for number in range(count)
        )
        results = Results(tmp_path / "gpu.json", dry_run=dry_run)
        Driver(results, tmp_path / "log.txt", dry_run=dry_run, stages=stages, script=script).run()
        kept: dict[str, Any] = json.loads(results.path.read_text())
        return kept

    return run


def statuses(kept: dict[str, Any]) -> list[str]:
    return [row["status"] for row in kept["rows"]]


def processes(kept: dict[str, Any]) -> list[str]:
    return [row["reason"] for row in kept["rows"]]


def test_a_stage_is_one_process_and_the_next_another(run: Run) -> None:
    kept = run(["a", "b"], count=2)
    first, second, third, fourth = processes(kept)
    assert first == second != third == fourth
    assert kept["about"]["gpu"] == "H"


def test_each_row_may_have_a_process(run: Run) -> None:
    assert len(set(processes(run(["a", "b", "c"], process_per_row=True)))) == 3


def test_a_dry_run_starts_one_process(run: Run) -> None:
    assert len(set(processes(run(["a", "b"], count=2, process_per_row=True, dry_run=True)))) == 1


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("crashes", "its process ended with signal SIGSEGV: segmentation fault"),
        ("dies in the middle of a word", "its process ended with exit code 1"),
        ("hangs", "stopped after 2 s"),
        ("has a CUDA error", ""),
        ("dies before it starts", ""),
    ],
)
def test_a_bad_row_costs_no_other(run: Run, bad: str, reason: str, dry_run: bool) -> None:
    kept = run(["has a CUDA error", bad, "fine", "also fine"], row_limit_s=2 if bad == "hangs" else 30, dry_run=dry_run)
    assert statuses(kept) == ["failed", "failed", "passed", "passed"]
    assert [row["name"] for row in kept["rows"]] == ["has a CUDA error", bad, "fine", "also fine"]
    assert kept["rows"][1]["reason"].startswith(reason)


def test_a_stage_that_cannot_start_is_one_failure(run: Run) -> None:
    kept = run(["cannot start"], count=2)
    assert statuses(kept) == ["failed", "failed"]
    assert kept["rows"][0]["reason"] == "its process ended with exit code 1: no module named x"


def test_rows_without_time_say_so(run: Run) -> None:
    kept = run(["fine", "hangs", "never"], limit_s=3)
    assert statuses(kept) == ["passed", "skipped", "skipped"]
    assert kept["rows"][1]["reason"] == "the time of this stage is spent"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_results_are_json_whatever_was_measured(
    value: float, monkeypatch: pytest.MonkeyPatch, stages: ModuleType, tmp_path: Path
) -> None:
    from gpu_run.results import Results, row_line
    from gpu_run.rows import Figure, judged

    finding = judged(met=False, bar="2", figures={"error": Figure(value, ""), "time": Figure(1.5, "s")})
    results = Results(tmp_path / "gpu.json", dry_run=False)
    results.add(stages.STAGES[0], "dk", finding.to_json())
    kept = json.loads(results.path.read_text(), parse_constant=pytest.fail)
    assert kept["rows"] == results.rows
    assert row_line(kept["rows"][0]) == f"dk: failed; error {value}, time 1.5 s; bar 2"


def test_ending_the_driver_ends_its_workers(tmp_path: Path) -> None:
    """An outer time limit: what was found is kept, and no process holds the GPU."""
    (tmp_path / "worker.py").write_text(FAKE_WORKER.format(names=["fine", "hangs"]))
    code = (
        "import sys, gpu, gpu_run.driver as driver\n"
        "from functools import partial\n"
        f"gpu.Driver = partial(driver.Driver, script=gpu.Path({str(tmp_path / 'worker.py')!r}))\n"
        "sys.exit(gpu.main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-c", code, "--dry-run", "--output", str(tmp_path)]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    results = tmp_path / "gpu.json"
    while not results.exists() or not json.loads(results.read_text())["rows"]:
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=1200) == 128 + signal.SIGTERM
    kept = json.loads(results.read_text())
    assert statuses(kept) == ["passed"]
    with pytest.raises(ProcessLookupError):
        os.kill(kept["about"]["pid"], 0)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The script, with workers whose rows are called what they do; keeps results and the page in a folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    import gpu_page

    monkeypatch.setattr(gpu_page, "RESULTS", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu_page, "PAGE", tmp_path / "gpu.md")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    script = tmp_path / "worker.py"
    monkeypatch.setattr(gpu, "Driver", partial(gpu.Driver, script=script))

    def main(names: list[str], *arguments: str) -> int:
        script.write_text(FAKE_WORKER.format(names=names))
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), *arguments])
        return int(gpu.main())

    return main


def test_kept_results_make_the_page(main: Callable[..., int], tmp_path: Path) -> None:
    assert main(["cuda_flash phi3"], "--stage", "kernels") == 0
    assert "verified on H, torch 1, 1: cuda_flash phi3" in (tmp_path / "gpu.md").read_text()
    assert main(["cuda_flash phi3", "has a CUDA error"], "--stage", "kernels") == 1
    assert "**fails**" not in (tmp_path / "gpu.md").read_text()  # no claim is about that row
    assert "| kernels | has a CUDA error | failed |" in (tmp_path / "gpu.md").read_text()


def test_a_dry_run_makes_no_page(main: Callable[..., int], tmp_path: Path) -> None:
    assert main(["cuda_flash phi3"], "--stage", "kernels", "--dry-run") == 0
    assert not (tmp_path / "gpu.md").exists()


def test_without_a_device_kept_results_stay(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu.json").write_text("kept")
    assert main(["no device"]) == 2
    assert "error: torch sees no CUDA device" in capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_text() == "kept"
    assert not (tmp_path / "gpu.md").exists()


def test_the_limits_fit_in_eight_minutes(stages: ModuleType) -> None:
    assert sum(stage.limit_s for stage in stages.STAGES) <= stages.TOTAL_S < 480
    # The last one may use all that the others left over.
    assert all(stage.row_limit_s <= stage.limit_s for stage in stages.STAGES[:-1])


def test_every_stage_runs_dry_with_the_engine_alone(stages: ModuleType, tmp_path: Path) -> None:
    """As on a machine that has torch and transformers, and nothing else that a user of kvpref has."""
    folder = tmp_path / "blocked"
    folder.mkdir()
    # Python runs this file at the start of every process.
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["dry_run"] is True
    assert kept["about"]["torch_version"] == torch.__version__
    names = [stage["name"] for stage in kept["stages"]]
    assert names == [stage.name for stage in stages.STAGES]
    assert all(row["reason"] for row in kept["rows"] if row["status"] == "skipped")
    with_figures = {row["stage"] for row in kept["rows"] if row["status"] in ("passed", "measured") and row["figures"]}
    assert with_figures == set(names) - NEED_A_DEVICE
