"""The stages of the GPU run in their order, the most telling first; standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some rows that belong together."""

    name: str
    """What results call it."""

    title: str
    """What it shows, in words."""

    limit_s: float
    """Its share of the time. What a stage leaves over goes to those after it."""

    row_limit_s: float
    """A row that takes longer is stopped: it hangs."""

    process_per_row: bool = False
    """Each row in a process of its own, whatever happens; else only after one that died."""

    @property
    def module(self) -> str:
        """The module with the stage's function `rows`."""
        return f"gpu_run.stage_{self.name}"


STAGES = (
    Stage(name="doctor", title="what is installed, and the backends tried", limit_s=20, row_limit_s=15),
    Stage(name="kernels", title="attention kernels beside float64", limit_s=35, row_limit_s=20),
    Stage(name="memcheck", title="compute-sanitizer on the kernels", limit_s=55, row_limit_s=55),
    Stage(name="far_rows", title="rows beyond 32-bit offsets", limit_s=25, row_limit_s=20, process_per_row=True),
    Stage(name="engine", title="models of real width in bf16 beside float64", limit_s=35, row_limit_s=25),
    Stage(name="tests", title="tests/gpu", limit_s=55, row_limit_s=40),
    Stage(name="steps", title="training steps and their synchronisations", limit_s=20, row_limit_s=15),
    Stage(name="prefix_cache", title="prefixes in host memory", limit_s=20, row_limit_s=20),
    Stage(name="rates", title="attention beside the rate of matrix products", limit_s=20, row_limit_s=12),
    Stage(name="short_prefix", title="short prefixes spread over several pairs", limit_s=8, row_limit_s=8),
    Stage(
        name="speed_ups",
        title="speed-ups over mode packed beside their bars",
        limit_s=95,
        row_limit_s=40,
        process_per_row=True,
    ),
    Stage(name="peers", title="FlexAttention's one row, and TRL", limit_s=30, row_limit_s=30),
    Stage(name="compiled", title="compiled layers", limit_s=35, row_limit_s=90),
)
TOTAL_S = 465.0
"""The driver ends by itself after so many seconds, with what it has: eight minutes with the time it takes to end."""
