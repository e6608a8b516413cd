"""The sweeps with tiny shapes: every row runs, and without what a GPU machine may lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvpref import collate

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
RunHere = Callable[..., tuple[int, str, str]]
ABSENT = ("datasets", "trl", "peft", "matplotlib", "kvpref.data", "kvpref.training")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmarks' own modules, which import one another by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import options
    import real_data
    import workloads

    return {"options": options, "real_data": real_data, "workloads": workloads}


def run(*arguments: object, code: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("OUT", None)
    command = ["-c", code] if code else []
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1200,
        check=False,
    )


@pytest.fixture
def run_here(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> RunHere:
    """The script in this process: exit code, output, errors."""
    import sweeps

    monkeypatch.delenv("OUT", raising=False)

    def run_here(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sweeps.py", *map(str, arguments)])
        return (sweeps.main(), *capsys.readouterr())

    return run_here


def read(path: Path) -> dict[str, list[str]]:
    """Rows and their cases, after a check that each holds what was measured."""
    report = json.loads(path.read_text())
    assert report["skipped"] == {}
    assert report["settings"]["dry_run"] is True
    for row in report["comparisons"]:
        for result in row["results"]:
            assert len(result["rounds_ms"]) == 2
            assert min(result["rounds_ms"]) > 0
            assert result["ideal"] > 0
    return {row["name"]: [result["name"] for result in row["results"]] for row in report["comparisons"]}


@pytest.mark.full
def test_a_dry_run_measures_every_row(tmp_path: Path) -> None:
    done = run(BENCHMARKS / "sweeps.py", "--dry-run", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    modes = ["two_pass", "one_pass", "packed"]
    real = ["hh_harmless", "mixed", "gsm8k", "game24 N=10", "game24 N=100", "squality flat", "squality stories"]
    steps = read(tmp_path / "train_step.json")
    assert list(steps)[: len(real)] == real
    assert all(cases == modes for cases in steps.values())
    assert {name.split()[0] for name in list(steps)[len(real) :]} == {
        "Capybara", "HH-RLHF", "MetaMath-DPO", "TLDR", "Helpsteer", "UltraFeedback"
    }  # fmt: skip
    shapes = ["512/128/2", "1024/128/2", "1024/128/8", "2048/64/4"]
    assert list(read(tmp_path / "forward_backward.json")) == [f"{s} vocab {v}" for v in ("49k", "1k") for s in shapes]
    assert list(read(tmp_path / "attention.json"))[:4] == shapes
    kinds = json.loads((tmp_path / "layer_kinds.json").read_text())
    names = [*(row["name"] for row in kinds["comparisons"]), *kinds["skipped"]]
    assert {name.split()[0] for name in names} == {"windows", "gated", "Mamba2", "8"}
    images = read(tmp_path / "images.json")
    assert [cases[-1] for cases in images.values()] == ["packed", "padded"] * 2
    assert all(cases[:2] == ["two_pass", "bounded"] for cases in images.values())
    assert all(cases == ["fused", "naive"] for cases in read(tmp_path / "logprob.json").values())
    attempts = read(tmp_path / "trajectories.json")
    assert attempts == {
        f"4 attempts, {rows}": ["two_pass", "one_pass", "bounded", "packed"] for rows in ("whole", "per call")
    }
    assert "efficiency" in done.stdout
    stories = json.loads((tmp_path / "train_step.json").read_text())["comparisons"][real.index("squality stories")]
    shared = stories["results"][0]["facts"]
    assert shared["num_micro_batches"] == 1
    # 27 tokens of the story and what follows: 2 questions of 24 tokens, 6 answers of 3 each.
    assert shared["unique_tokens"] == 27 + 2 * (24 + 6 * 3)


def test_rows_for_a_gpu_need_the_engine_only(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"for name in {ABSENT!r}: sys.modules[name] = None  # importing it now raises ImportError\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "runpy.run_path(sys.path[0] + '/sweeps.py', run_name='__main__')\n"
    )
    done = run("--device", "cuda", "--dry-run", "--output", tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    assert list(read(tmp_path / "forward_backward_cuda.json")) == ["4096/512/2", "16384/64/2", "8192/2048/32"]
    attention = read(tmp_path / "attention_cuda.json")
    assert len(attention) == 6
    assert all(name.endswith("/28") for name in attention)
    assert "matplotlib is not installed" in done.stdout
    assert not list(tmp_path.glob("*.png"))


def test_missing_data_skips_the_row_and_says_so(run_here: RunHere, tmp_path: Path) -> None:
    row = ("--sweep", "train_step", "--row", "hh_harmless")
    code, out, err = run_here(*row, "--shared", tmp_path / "absent", "--output", tmp_path)
    assert code == 0, err
    assert "skipped hh_harmless: no " in out
    report = json.loads((tmp_path / "train_step.json").read_text())
    assert report["comparisons"] == []
    assert "hh_harmless_pairs.jsonl" in report["skipped"]["hh_harmless"]


def test_a_spent_budget_starts_no_row(run_here: RunHere, tmp_path: Path) -> None:
    code, out, err = run_here("--dry-run", "--sweep", "logprob", "--budget", 0, "--output", tmp_path)
    assert code == 0, err
    assert out.count("the time budget is spent") == 3


BAD_SWEEP = """
import os
from functools import partial

from kvpref.profiling.compare.comparison import Comparison

TITLE = "bad rows"

def rows(options):
    return {"dies": partial(os._exit, 9), "breaks": partial(int, "x"), "fine": fine}

def fine():
    return Comparison(name=f"fine {os.getpid()}", baseline="a", results=())
"""


def test_a_row_apart_takes_no_other_along(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU, where a row that breaks leaves its process useless."""
    import sweeps

    (tmp_path / "bad_sweep.py").write_text(BAD_SWEEP)
    monkeypatch.syspath_prepend(str(tmp_path))
    import bad_sweep

    assert {"cuda": sweeps.measure_apart} == sweeps.MEASURE
    monkeypatch.setattr(sweeps, "MEASURE", {"cpu": sweeps.measure_apart})
    monkeypatch.setattr(sweeps, "SWEEPS", {"bad": bad_sweep})
    kept: list[tuple[int, int]] = []
    write = sweeps.Report.write

    def spy(report: Any, path: Path) -> None:
        write(report, path)
        kept.append((len(report.comparisons), len(report.skipped)))

    monkeypatch.setattr(sweeps.Report, "write", spy)
    options = modules["options"].SweepOptions(device=torch.device("cpu"), dry_run=True)
    report = sweeps.run_sweep("bad", options, [], None, tmp_path)
    assert report.skipped["dies"].startswith("failed: its process died")
    assert report.skipped["breaks"].startswith("failed: ValueError: invalid literal for int()")
    (comparison,) = report.comparisons
    assert comparison.name.startswith("fine ")
    assert comparison.name != f"fine {os.getpid()}"
    # Written after each row.
    assert kept[:3] == [(0, 1), (0, 2), (1, 2)]


def test_unknown_rows_are_refused(run_here: RunHere, tmp_path: Path) -> None:
    code, _, err = run_here("--dry-run", "--sweep", "logprob", "--row", "x", "--output", tmp_path)
    assert code == 2
    assert "no row 'x'; choose from: 1024 x 384 x 50432" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_gpu_is_said(run_here: RunHere, tmp_path: Path) -> None:
    code, _, err = run_here("--device", "cuda", "--output", tmp_path)
    assert code == 2
    assert "needs a CUDA device" in err


def test_any_beginning_of_the_order_is_spread_evenly(modules: dict[str, ModuleType]) -> None:
    order = modules["real_data"].spread_order(1000)
    assert sorted(order) == list(range(1000))
    for count in (4, 10, 50):
        gaps = sorted([*order[:count], 1000])
        assert max(b - a for a, b in zip([0, *gaps], gaps, strict=False)) <= 3 * 1000 / count


def test_length_statistics_have_the_published_median_and_ratio(modules: dict[str, ModuleType]) -> None:
    options = modules["options"].SweepOptions(device=torch.device("cpu"))
    builders = modules["workloads"].length_statistics(options)
    (groups,) = next(build for name, build in builders.items() if name.startswith("TLDR"))().cuts["two_pass"]
    for group in groups:
        for sequence in group.sequences:
            assert len(sequence) == 416
            assert (len(sequence) - sum(sequence.scored)) / sum(sequence.scored) == pytest.approx(11.14, rel=0.02)
    assert 2 * 416 * len(groups) <= 4096


def test_a_group_cut_for_memory_keeps_all_its_sequences(modules: dict[str, ModuleType]) -> None:
    workloads = modules["workloads"]
    shape = workloads.Shape(prompt=5, response=2, responses=7, packed_cut=3)
    groups = workloads.make_groups(shape, vocab_size=50)
    cuts = workloads.one_micro_batch(groups, shape.packed_cut)
    assert [len(group) for part in cuts["packed"] for group in part] == [3, 3, 1]
    assert [s for part in cuts["packed"] for group in part for s in group.sequences] == list(groups[0].sequences)
    assert len({sequence.input_ids[5] for sequence in groups[0].sequences}) == 7


def test_real_files_make_steps_within_their_budget(modules: dict[str, ModuleType], shared_dir: Path) -> None:
    options = modules["options"].SweepOptions(device=torch.device("cpu"), shared=shared_dir, quick=True)
    ((groups,),) = [modules["real_data"].real_files(options)["hh_harmless"]().cuts["two_pass"]]
    num_tokens = sum(len(sequence) for group in groups for sequence in group.sequences)
    assert 1024 <= num_tokens <= 2048
    assert all(len(group) == 2 and group.labels == (True, False) for group in groups)


def test_what_bounded_runs_again_is_all_but_what_its_limit_keeps(modules: dict[str, ModuleType]) -> None:
    groups = modules["workloads"].make_groups(modules["workloads"].Shape(prompt=40, response=8, responses=5), 100)
    from trajectories import run_again

    from kvpref.plan.step import join_batches

    chunks = join_batches([collate(groups)], max_tokens_per_chunk=16).chunks.all
    assert [chunk.num_tokens for chunk in chunks] == [16, 16, 8, 16, 16, 8]
    # The last 8 fit in 16 tokens with nothing besides; the last three in 40.
    assert run_again(chunks, 16).work.num_tokens == 72
    again = run_again(chunks, 40)
    assert (again.num_chunks, again.work.num_tokens) == (6, 40)
    # The prompt's causal triangle; its last row predicts the first token of five responses.
    assert (again.work.num_pairs, again.work.num_scored) == (40 * 41 // 2, 5)
    assert run_again(chunks, None).work.num_tokens == 0
