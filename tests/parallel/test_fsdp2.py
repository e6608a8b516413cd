"""Ranks of a model sharded by FSDP2 give the gradients of one process, whatever passes and chunks each of them has."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_processes import run_two_processes

WORKER = Path(__file__).with_name("fsdp2_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_sharded_ranks_match_one_process(num_ranks: int) -> None:
    run_two_processes(WORKER, num_ranks=num_ranks)
