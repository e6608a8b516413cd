"""`shared_prefix` in a user's own loop, on weights that FSDP2 spreads over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_processes import run_two_processes

WORKER = Path(__file__).with_name("shared_prefix_worker.py")


@pytest.mark.full
@pytest.mark.slow
def test_ranks_with_and_without_anything_to_share() -> None:
    run_two_processes(WORKER)
