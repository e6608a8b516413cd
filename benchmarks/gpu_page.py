"""docs/gpu.md from the results of `make bench-gpu` that are kept in the repository; standard library only:

python benchmarks/gpu_page.py
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from gpu_claims import CLAIMS, Claim
from gpu_run.results import FILE_NAME, counted, figures_text
from places import HERE, ROOT

RESULTS = HERE / "results" / "gpu" / FILE_NAME
PAGE = ROOT / "docs" / "gpu.md"
HEAD = """# What is verified on a GPU

`make bench-gpu` runs on a machine with one CUDA device in under eight minutes: kernels against float64, a memory
checker, models of real width, training steps, then speed. `benchmarks/gpu_page.py` writes this page from what such a
run found. "On stand-ins" means: the Python around the kernels is tested on a CPU, with kernels that are written in
PyTorch; that says nothing about the kernels themselves.
"""
MOST_FIGURES = 4


def main() -> None:
    write()
    print(PAGE)


def write() -> None:
    """Write the page from the kept results, or without results."""
    PAGE.write_text(page(json.loads(RESULTS.read_text()) if RESULTS.exists() else None))


def page(results: dict[str, Any] | None) -> str:
    """The page as Markdown.

    Args:
        results: The run's results; None if there was no run, or only a dry one.
    """
    if results is not None and results["dry_run"]:
        results = None
    lines = [HEAD, summary(results), "", "| what | state |", "| --- | --- |"]
    lines += [f"| {claim.text} | {state(claim, results)} |" for claim in CLAIMS]
    if results is not None:
        lines += [
            "",
            "## All rows",
            "",
            "| stage | row | status | figures | bar | remark |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_row(row) for row in results["rows"]]
    return "\n".join(lines) + "\n"


def summary(results: dict[str, Any] | None) -> str:
    """One paragraph."""
    if results is None:
        return "No run on a GPU is kept in the repository: nothing below is verified on one."
    counts = counted(Counter(row["status"] for row in results["rows"]))
    return f"Last run: {machine(results)}. {counts}."


def machine(results: dict[str, Any]) -> str:
    """GPU, versions and date."""
    about = results["about"]
    if about is None:
        return "no process came as far as naming the machine"
    parts = [
        about["gpu"],
        f"torch {about['torch_version']}",
        f"transformers {about['transformers_version']}",
        f"python {about['python_version']}",
    ]
    parts += [f"commit {about['git_commit'][:12]}"] if about.get("git_commit") else []
    return ", ".join([*parts, about["date"]])


def state(claim: Claim, results: dict[str, Any] | None) -> str:
    """The state of a claim."""
    rows = [] if results is None else _rows_of(claim, results)
    ran = [row for row in rows if row["status"] != "skipped"]
    if results is None or not ran:
        return _without_a_gpu(claim, rows)
    broken = [row for row in ran if row["status"] == "failed"]
    about = results["about"]
    where = (
        f"{about['gpu']}, torch {about['torch_version']}, {about['date'][:10]}"
        if about is not None
        else "an unknown machine"
    )
    if broken:
        names = ", ".join(row["name"] for row in broken[:MOST_FIGURES])
        return f"**fails** on {where}: {len(broken)} of {len(ran)} rows ({_cell(names)})"
    verb = "measured" if all(row["status"] == "measured" for row in ran) else "verified"
    verb = f"partly {verb}" if len(rows) > len(ran) else verb
    shown = "; ".join(f"{row['name']}: {figures_text(row)}" for row in ran)
    text = shown if len(ran) <= MOST_FIGURES else f"{len(ran)} rows, see below"
    left_out = f"; {len(rows) - len(ran)} rows skipped" if len(rows) > len(ran) else ""
    return f"{verb} on {where}: {_cell(text)}{left_out}"


def _rows_of(claim: Claim, results: dict[str, Any]) -> list[dict[str, Any]]:
    # A stage that never reached its rows has one named "start".
    beginnings = (*claim.rows, "start")
    return [row for row in results["rows"] if row["stage"] == claim.stage and row["name"].startswith(beginnings)]


def _without_a_gpu(claim: Claim, skipped: list[dict[str, Any]]) -> str:
    name = None if claim.stand_in is None else f"[{claim.stand_in}](../{claim.stand_in})"
    text = "not verified" if name is None else f"on stand-ins only ({name})"
    return text + (f"; skipped in the last run: {_cell(skipped[0]['reason'])}" if skipped else "")


def _row(row: dict[str, Any]) -> str:
    cells = (row["stage"], row["name"], row["status"], figures_text(row), row["bar"] or "", row["reason"] or "")
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
