"""Fixtures that all tests may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tiny tensors: a thread pool costs more than it saves, and tests run side by side.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data where a checkout has it: the folder KVPREF_SHARED, or `shared` beside the repository."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("KVPREF_SHARED", root.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set KVPREF_SHARED to a folder that holds it")
    return path


@pytest.fixture
def own_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that train in mixed precision, which accelerate and transformers keep for the rest of the process."""
    from accelerate.state import AcceleratorState  # a GPU machine may lack it

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # restored afterwards: transformers sets it
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
