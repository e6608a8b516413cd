"""The tests that need a GPU, one row per test function."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from options import SweepOptions
from places import ROOT

from gpu_run.rows import Figure, Finding, Rows, failed, judged, skipped

FOLDER = "tests/gpu"
ELSEWHERE = ("tests/profiling/test_timing.py", "tests/profiling/memory/test_peak.py")
LAST = ("test_cuda_flash", "test_efficient", "test_flash_attn", "test_xformers")
"""Files whose blocks and trees another stage shows, too."""


def rows(options: SweepOptions) -> Rows:
    """One row per test function, those of the whole engine first."""
    if importlib.util.find_spec("pytest") is None:
        return {FOLDER: lambda: skipped("pytest is not installed")}
    functions, broken = _collect()
    if not functions:
        return {FOLDER: lambda: failed("pytest collected no test")}
    functions.sort(key=lambda name: any(file in name for file in LAST))
    if options.dry_run:
        functions = functions[:2]  # without a device all of them skip
    found: Rows = {name.removeprefix(f"{FOLDER}/"): partial(_row, name) for name in functions}
    return found | {name.removeprefix(f"{FOLDER}/"): partial(_not_imported, why) for name, why in broken.items()}


def _not_imported(why: str) -> Finding:
    """A file that pytest could not import: left out if a package is missing, otherwise broken."""
    return skipped(why) if "ModuleNotFoundError" in why else failed(why)


def _row(function: str) -> Finding:
    outcomes: Counter[str] = Counter()
    first_words: dict[str, str] = {}

    class Watch:
        """Counts what pytest reports."""

        def pytest_runtest_logreport(self, report: Any) -> None:
            # A test that is skipped, or whose set-up fails, has no call.
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome] += 1
                first_words.setdefault(report.outcome, _words(report))

    _pytest([function], Watch())
    figures = {name: Figure(count, "") for name, count in outcomes.items()}
    if set(outcomes) == {"skipped"}:
        return skipped(first_words["skipped"])
    reason = first_words.get("failed") or (first_words.get("skipped") or None)
    return judged(met=not outcomes["failed"] and outcomes.total() > 0, bar="no failure", figures=figures, reason=reason)


def _words(report: Any) -> str:
    """Why it did not pass, in one line."""
    if report.outcome == "skipped":
        return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash is not None else str(report.longrepr)
    return f"{report.nodeid.rpartition('::')[2]}: {message.splitlines()[0][:200]}" if message else ""


def _collect() -> tuple[list[str], dict[str, str]]:
    """Test functions, and the reason for each file that cannot be imported."""
    functions: dict[str, None] = {}
    broken: dict[str, str] = {}

    class Gather:
        """Notes what pytest collects."""

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                broken[report.nodeid] = report.longreprtext.strip().splitlines()[-1].removeprefix("E").strip()

        def pytest_collection_finish(self, session: Any) -> None:
            functions.update(dict.fromkeys(item.nodeid.partition("[")[0] for item in session.items))

    _pytest(["--collect-only", FOLDER, *ELSEWHERE], Gather())
    return list(functions), broken


def _pytest(arguments: list[str], plugin: Any) -> None:
    import pytest

    run: Callable[..., Any] = pytest.main
    options = ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-m", "gpu and not full", "-q"]
    run([*options, *arguments], plugins=[plugin])
