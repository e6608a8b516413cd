"""docs/gpu.md says what the kept results of the GPU run say, and changes with them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvpref.ops.attention.backends import backend_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_page

    return gpu_page


def row(stage: str, name: str, status: str, **values: Any) -> dict[str, Any]:
    return {"stage": stage, "name": name, "status": status, "figures": {}, "bar": None, "reason": None, **values}


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    about = {
        "gpu": "NVIDIA H100",
        "torch_version": "2.11.0+cu130",
        "transformers_version": "5.17.0",
        "python_version": "3.12.3",
        "git_commit": "0123456789abcdef",
        "date": "2031-02-03T04:05:06+00:00",
    }
    return {"about": about, "dry_run": False, "stages": [], "rows": list(rows)}


def test_the_page_is_what_the_script_makes_of_the_kept_results(
    gpu_page: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_page, "PAGE", tmp_path / "gpu.md")
    gpu_page.write()
    written = (ROOT / "docs" / "gpu.md").read_text()
    assert (tmp_path / "gpu.md").read_text() == written, "run: python benchmarks/gpu_page.py"


def test_without_results_nothing_is_verified(gpu_page: ModuleType) -> None:
    page = gpu_page.page(None)
    assert "nothing below is verified" in page
    claims = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(claims) == len(gpu_page.CLAIMS)
    assert all("on stand-ins only" in line or "not verified" in line for line in claims)


def test_the_page_follows_the_results(gpu_page: ModuleType) -> None:
    error = {"largest error": {"value": 0.00123, "unit": ""}}
    page = gpu_page.page(
        results(
            row("kernels", "cuda_flash phi3 64 x4 bfloat16", "passed", figures=error),
            row("kernels", "flash_attn_3 phi3 64 x4 bfloat16", "failed", reason="dk 1.0 | dq"),
            row("memcheck", "cuda_flash", "skipped", reason="compute-sanitizer is missing"),
            row("far_rows", "cuda_flash alone", "passed", figures=error),
            row("far_rows", "xformers alone", "skipped", reason="the time of this stage is spent"),
            row("rates", "merge", "measured", figures={"merge forward": {"value": 2345.6, "unit": "GB/s"}}),
        )
    )
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}

    def state(beginning: str) -> str:
        return next(line for what, line in lines.items() if what.startswith(beginning))

    assert "Last run: NVIDIA H100, torch 2.11.0+cu130, transformers 5.17.0, python 3.12.3, commit 0123456789ab" in page
    assert "2 passed, 1 failed, 2 skipped, 1 measured" in page
    where = "NVIDIA H100, torch 2.11.0+cu130, 2031-02-03"
    assert f"verified on {where}: cuda_flash phi3 64 x4 bfloat16: largest error 0.00123" in state(
        "attention of backend `cuda_flash`"
    )
    assert f"**fails** on {where}: 1 of 1 rows" in state("attention of backend `flash_attn_3`")
    # No row of this one: its name is the beginning of the other's.
    assert "on stand-ins only" in state("attention of backend `flash_attn`,")
    assert "not verified; skipped in the last run: compute-sanitizer is missing" in state("no kernel reads")
    assert state("calls with more rows").endswith("largest error 0.00123; 1 rows skipped |")
    assert f"measured on {where}: merge: merge forward 2346 GB/s" in state("rate of attention")
    assert "| kernels | flash_attn_3 phi3 64 x4 bfloat16 | failed |  |  | dk 1.0 \\| dq |" in page


def test_a_run_that_never_came_to_the_machine_makes_a_page_too(gpu_page: ModuleType) -> None:
    kept = results(row("doctor", "start", "failed", reason="no module named x")) | {"about": None}
    page = gpu_page.page(kept)
    assert "Last run: no process came as far as naming the machine. 1 failed." in page
    assert "**fails**" not in page
    far = results(row("far_rows", "start", "failed", reason="no module named x")) | {"about": None}
    assert "**fails** on an unknown machine: 1 of 1 rows (start)" in gpu_page.page(far)


def test_a_part_of_the_rows_is_a_part_of_the_claim(gpu_page: ModuleType) -> None:
    page = gpu_page.page(results(row("steps", "dpo", "passed"), row("steps", "kto", "skipped", reason="no time")))
    assert "never waits for the device | partly verified on NVIDIA H100" in page
    page = gpu_page.page(results(row("steps", "dpo", "passed"), row("steps", "kto", "passed")))
    assert "never waits for the device | verified on NVIDIA H100" in page


def test_a_stage_that_did_not_start_fails_its_claims(gpu_page: ModuleType) -> None:
    page = gpu_page.page(results(row("kernels", "start", "failed", reason="no module named x")))
    assert page.count("**fails** on NVIDIA H100, torch 2.11.0+cu130, 2031-02-03: 1 of 1 rows (start)") > 1


def test_a_dry_run_verifies_nothing(gpu_page: ModuleType) -> None:
    dry = results(row("kernels", "cuda_flash phi3", "passed")) | {"dry_run": True}
    assert gpu_page.page(dry) == gpu_page.page(None)


def test_claims_name_stages_and_tests_that_exist(gpu_page: ModuleType) -> None:
    from gpu_run.stages import STAGES

    stages = {stage.name for stage in STAGES}
    assert {claim.stage for claim in gpu_page.CLAIMS} == stages - {"doctor"}
    for claim in gpu_page.CLAIMS:
        assert claim.stand_in is None or (ROOT / claim.stand_in).is_file(), claim.stand_in


def test_every_backend_of_a_gpu_has_a_claim(gpu_page: ModuleType) -> None:
    for name in set(backend_names()) - {"cpu_flash", "tiled", "reference"}:
        (claim,) = [claim for claim in gpu_page.CLAIMS if claim.stage == "kernels" and f"`{name}`" in claim.text]
        cases = {other: f"{other} phi3 64 x1 bfloat16".startswith(claim.rows) for other in backend_names()}
        assert [other for other, matches in cases.items() if matches] == [name]
