"""Benchmarks import one another by their bare names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def names_mean_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gpu` means benchmarks/gpu.py, also where pytest has imported tests from tests/gpu, as a package of that name."""
    for path in BENCHMARKS.glob("*.py"):
        module = sys.modules.get(path.stem)
        if module is not None and getattr(module, "__file__", None) is None:
            monkeypatch.delitem(sys.modules, path.stem)
