"""Peak memory of one call, as PyTorch's own allocators count it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MEASURED = "kvpref: the measured call"


def peak_bytes(function: Callable[[], object], device: torch.device, resident_bytes: int) -> int:
    """Most bytes that tensors held at once during one call, those held before it included.

    On CUDA the allocator knows. The CPU's allocator reports to the profiler what is allocated and freed while that
    watches; so the function is called twice, and the second call is measured: what the first one leaves behind (the
    gradients of a step, say) is then known.

    Args:
        function: What to measure.
        device: Where it works.
        resident_bytes: For the CPU: bytes that were held before and stay (weights, optimizer state).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
        with record_function(_MEASURED):
            function()
    return resident_bytes + _highest_total(profiler)


def _highest_total(profiler: profile) -> int:
    """The most that allocations exceeded frees by, from the marker on."""
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = profiler.profiler.kineto_results.events()
    began = next(event.start_ns() for event in events if event.name() == _MEASURED)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = highest = 0
    for time_ns, num_bytes in changes:
        total += num_bytes
        if time_ns >= began:
            highest = max(highest, total)
    return highest
