"""Times several cases against one another on a machine that may be busy with other work.

The cases take turns inside each round, in one process, so that a slow phase of the machine affects all of them; ratios
are compared within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kvpref.errors import InputError

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
"""Name -> clock in seconds. ``wall`` is what a user waits for. ``process`` counts only what this process computes, in
all its threads: for shared machines, with one thread (threads that wait for one another count as well)."""


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """How often cases are timed."""

    num_rounds: int = 5
    """Rounds; every case is timed once in each."""

    num_warmup: int = 1
    """Uncounted rounds before them, for allocations, page faults and kernel selection."""

    budget_s: float | None = None
    """No new round starts after this many seconds, once there are `min_rounds`; None for no limit."""

    min_rounds: int = 3
    """Rounds that run whatever the budget, but no more than `num_rounds`."""

    clock: str = "wall"
    """One of `CLOCKS`; CUDA devices have their own."""

    def __post_init__(self) -> None:
        for name in ("num_rounds", "min_rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.num_warmup < 0:
            raise InputError(f"num_warmup must not be negative; got {self.num_warmup}")
        if self.clock not in CLOCKS:
            raise InputError(f"unknown clock {self.clock!r}; choose from: {', '.join(CLOCKS)}")


def time_rounds(
    cases: Mapping[str, Callable[[], object]], device: torch.device, options: TimingOptions | None = None
) -> dict[str, tuple[float, ...]]:
    """Time every case once per round.

    The first case changes from round to round, so that no case always follows the same other one.

    Args:
        cases: Name -> function to time; called without arguments.
        device: The device the work runs on. On CUDA, events of the current stream measure it, from an idle device until
            the last kernel has ended; elsewhere the clock does.
        options: `TimingOptions()` if None.

    Returns:
        Name -> milliseconds per round, equally many for every case.
    """
    options = options or TimingOptions()
    names = list(cases)
    for _ in range(options.num_warmup):
        for name in names:
            cases[name]()
    rounds: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for number in range(options.num_rounds):
        spent_s = time.perf_counter() - started
        if number >= options.min_rounds and options.budget_s is not None and spent_s > options.budget_s:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            rounds[name].append(time_once(cases[name], device, options.clock))
    return {name: tuple(values) for name, values in rounds.items()}


def time_once(function: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Milliseconds of one call, including what it started on the device."""
    if device.type != "cuda":
        now = CLOCKS[clock]
        started = now()
        function()
        return (now() - started) * 1000
    torch.cuda.synchronize(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    milliseconds: float = start.elapsed_time(end)
    return milliseconds
