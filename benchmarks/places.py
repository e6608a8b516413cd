"""Folders of the benchmarks; standard library only."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def results_folder(*, keep: bool, part: str = "") -> Path:
    """The folder for results: $OUT if set; otherwise the one under version control, or one outside it.

    Args:
        keep: Whether the run measures everything in the kept results; a partial run must not replace them.
        part: A subfolder of the one under version control.
    """
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return HERE / "results" / part if keep else ROOT / "outputs" / "bench"
