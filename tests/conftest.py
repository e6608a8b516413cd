"""Fixtures that all tests may use."""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tiny tensors: a thread pool costs more than it saves, and tests run side by side.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Let hypothesis draw the same examples each time, and new ones in `make test-all`."""
    try:
        from hypothesis import settings
    except ImportError:  # a GPU machine may lack it
        return
    # A deadline per example fails on a busy machine, whatever the code does.
    settings.register_profile("kvpref", deadline=None, derandomize=config.option.markexpr == "not full")
    settings.load_profile("kvpref")


@pytest.hookimpl(tryfirst=True)  # before -m leaves out what is `full`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `full` all parameter sets of a test that is `thinned(n)` but n of them, spread evenly over the list."""
    sets = defaultdict(list)
    for item in items:
        if item.get_closest_marker("thinned") and not item.get_closest_marker("full"):
            sets[item.nodeid.partition("[")[0]].append(item)
    for own in sets.values():
        (num_kept,) = own[0].get_closest_marker("thinned").args  # type: ignore[union-attr]
        kept = {len(own) * number // num_kept for number in range(num_kept)}
        for number, item in enumerate(own):
            if number not in kept:
                item.add_marker(pytest.mark.full)


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection() -> None:
    """Leave what modules hold out of garbage collection.

    accelerate collects after each training, and walks through all objects: several times the training of a tiny model.
    """
    gc.collect()
    gc.freeze()


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
