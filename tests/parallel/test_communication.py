"""What `kvpref plan` predicts that FSDP2 sends is what two ranks send."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_processes import run_two_processes


@pytest.mark.full
@pytest.mark.slow
def test_collectives_of_fsdp2_are_as_predicted() -> None:
    run_two_processes(Path(__file__).with_name("communication_worker.py"))
