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
LAST = ("test_cuda_flash", "test_efficient", "test_flash_attn", "test_xformers")
"""Files whose blocks and trees another stage shows, too."""


def rows(options: SweepOptions) -> Rows:
    """The whole engine first."""
    if importlib.util.find_spec("pytest") is None:
        return {FOLDER: lambda: skipped("pytest is not installed")}
    functions: dict[str, list[str]] = {}
    for node in _collect():
        functions.setdefault(node.partition("[")[0], []).append(node)
    if not functions:
        return {FOLDER: lambda: failed("pytest collected no test")}
    names = sorted(functions, key=lambda name: any(file in name for file in LAST))
    if options.dry_run:
        names = names[:2]  # without a device all of them skip
    return {name.removeprefix(f"{FOLDER}/"): partial(_row, functions[name]) for name in names}


def _row(nodes: list[str]) -> Finding:
    outcomes: Counter[str] = Counter()
    first_words: dict[str, str] = {}

    class Watch:
        """Counts what pytest reports."""

        def pytest_runtest_logreport(self, report: Any) -> None:
            # A test that is skipped, or whose set-up fails, has no call.
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome] += 1
                first_words.setdefault(report.outcome, _words(report))

    _pytest(nodes, Watch())
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


def _collect() -> list[str]:
    found: list[str] = []

    class Gather:
        """Notes what pytest collects."""

        def pytest_collection_finish(self, session: Any) -> None:
            found.extend(item.nodeid for item in session.items)

    _pytest(["--collect-only", FOLDER], Gather())
    return found


def _pytest(arguments: list[str], plugin: Any) -> None:
    import pytest

    run: Callable[..., Any] = pytest.main
    # `-m` empty: the full matrices as well.
    run(
        ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", "-q", *arguments],
        plugins=[plugin],
    )
