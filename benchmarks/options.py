"""Options of every sweep."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from places import ROOT

from kvpref.profiling.timing import TimingOptions


class MissingDataError(Exception):
    """A workload needs a file that is not here; the message names it."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Where the sweeps run, and how much of them."""

    device: torch.device
    """Where the tensors are."""

    gpu_rows: bool = False
    """The rows that are meant for a data-centre GPU (layers of an 8B model) instead of those for a CPU."""

    quick: bool = False
    """A few of the rows, small."""

    dry_run: bool = False
    """Every row with tiny shapes and made-up data: shows that everything runs, measures nothing worth keeping."""

    shared: Path | None = None
    """Folder with `data` and `tokenizers`; None looks for the environment's KVPREF_SHARED, then beside the checkout."""

    backend: str = "auto"
    """Attention backend of all cases."""

    clock: str = "wall"
    """Which of `kvpref.profiling.timing.CLOCKS` measures on a CPU."""

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on CUDA, float32 elsewhere."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def with_memory(self) -> bool:
        """Whether peaks are measured: on a CPU that takes two more runs per case, under the profiler."""
        return self.device.type == "cuda"

    @property
    def timing(self) -> TimingOptions:
        """Rounds per row; slow rows stop at the third."""
        if self.dry_run:
            return TimingOptions(num_rounds=2, num_warmup=0, clock=self.clock)
        # Every case has run once, for its results, before it is timed.
        num_rounds = 3 if self.quick else 5
        budget_s = 10.0 if self.gpu_rows else 30.0
        return TimingOptions(num_rounds=num_rounds, num_warmup=0, budget_s=budget_s, clock=self.clock)

    def shared_file(self, name: str) -> Path:
        """A file or folder of the shared data.

        Raises:
            MissingDataError: If it is not there.
        """
        root = self.shared or Path(os.environ.get("KVPREF_SHARED", ROOT.parent / "shared"))
        path = root / name
        if not path.exists():
            raise MissingDataError(
                f"no {path}; --shared or KVPREF_SHARED names the folder that holds data/ and tokenizers/"
            )
        return path
