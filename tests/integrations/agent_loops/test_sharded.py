"""`tree_logps` in a loop of one's own, over models that DDP or FSDP2 wrap."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_processes import run_two_processes

WORKER = Path(__file__).with_name("agent_loops_worker.py")


@pytest.mark.full
def test_ranks_with_different_numbers_of_passes() -> None:
    run_two_processes(WORKER)
