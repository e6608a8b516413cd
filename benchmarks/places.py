"""Folders of the benchmarks; standard library only."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def results_folder(*, keep: bool, part: str = "") -> Path:
    """Where results go: $OUT if it is set; else the folder under version control, or one outside it.

    Args:
        keep: Whether the run measures all that the kept results hold; a part of it must not replace them.
        part: A folder in that under version control.
    """
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return HERE / "results" / part if keep else ROOT / "outputs" / "bench"
