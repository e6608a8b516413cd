"""Forward and backward of a model: `two_pass` and `one_pass` against `packed`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mode_rows import measure_modes
from options import SweepOptions
from workloads import gpu_grid, grid

from kvpref import Batch, LossOutput, ResponseLogps
from kvpref.profiling.compare.comparison import Comparison

TITLE = "forward + backward of a model"


def rows(options: SweepOptions) -> dict[str, Callable[[], Comparison]]:
    """Name -> what measures that row."""
    builders = gpu_grid(options) if options.gpu_rows else grid(options)
    return {
        name: partial(measure_modes, name, build, options, loss=lambda workload: mean_nll, with_optimizer=False)
        for name, build in builders.items()
    }


def mean_nll(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    """Mean over all sequences of the negative log-prob per token."""
    return LossOutput(-policy.mean().mean(), metrics={})
