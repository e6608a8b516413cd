"""Peak memory of one call, as counted by PyTorch's allocators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from kvpref.profiling.quiet_profiler import quiet_profile

_MEASURED = "kvpref: the measured call"


def peak_bytes(function: Callable[[], object], device: torch.device, resident_bytes: int) -> int:
    """Most bytes that tensors held at once during one call, including those held before it.

    On CUDA the allocator knows. The CPU's allocator reports allocations to a running profiler; so the function is
    called twice, and the second call is measured: what the first leaves behind, such as gradients, is then known.

    Args:
        function: The call to measure.
        device: The device it uses.
        resident_bytes: For the CPU: bytes held before that stay (weights, optimizer state).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with quiet_profile([ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
        with record_function(_MEASURED):
            function()
    return resident_bytes + _highest_total(profiler)


def _highest_total(profiler: profile) -> int:
    """The largest excess of allocations over frees since the marker."""
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = list(_flatten(profiler.profiler.kineto_results.experimental_event_tree()))
    began = next(event.start_time_ns for event in events if event.name == _MEASURED)
    changes = sorted(
        ((event.start_time_ns, event.extra_fields) for event in events if event.tag == _EventType.Allocation),
        key=lambda change: change[0],
    )
    held: set[int] = set()
    total = highest = 0
    for time_ns, change in changes:
        if change.alloc_size > 0:
            held.add(change.ptr)
        elif change.ptr in held:
            held.remove(change.ptr)
        else:
            continue  # allocated before the profiler started: not part of the total, so neither is freeing it
        total += change.alloc_size
        if time_ns >= began:
            highest = max(highest, total)
    return highest


def _flatten(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _flatten(event.children)
