"""What a real training step holds in memory, measured and split by kind of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from kvpref.losses import LossFunction, PreferenceLoss
from kvpref.profiling.memory.peak import peak_bytes
from kvpref.profiling.memory.step import MemoryCase, PrefixSize, ProfiledStep
from kvpref.profiling.memory.timeline import MemorySnapshot
from kvpref.profiling.memory.tracker import GRADIENTS, OTHER, PREFIX_KV, MemoryTracker

MAX_HISTORY_ENTRIES = 200_000
"""Most allocations in a snapshot of CUDA's allocator."""


@dataclass(frozen=True, kw_only=True)
class MemoryProfile:
    """The memory that one step held."""

    name: str

    variant: str

    num_responses: int | None

    facts: Mapping[str, int]
    """Counts of the step: micro-batches, sequences, tokens."""

    peak: MemorySnapshot
    """The most that was held at once. What the allocator counts beyond the tracker is in ``other``."""

    tracked_bytes: int
    """The peak according to the tracker alone."""

    allocated_bytes: int
    """The peak according to PyTorch's allocator, which includes workspaces of kernels and, on CUDA, rounds sizes up."""

    reserved_bytes: int | None
    """Most that CUDA's allocator took from the device; None on other devices."""

    peak_by_region: Mapping[str, MemorySnapshot]
    """Region -> the most that was held while it ran, according to the tracker."""

    prefix_bytes: int
    """Most bytes that held prefix keys and values."""

    prefix_size: PrefixSize
    """Their size according to the formula."""

    timeline: tuple[MemorySnapshot, ...]
    """What was held over the step, according to the tracker."""

    allocator_snapshot: str | None
    """File for PyTorch's memory viewer (https://pytorch.org/memory_viz); None if none was written."""


def profile_step(step: ProfiledStep, *, snapshot: Path | None = None) -> MemoryProfile:
    """Run a step a few times and measure it.

    The first run warms up, so that optimizer states and gradients exist as in the middle of training.

    Args:
        step: The step to run; its weights change.
        snapshot: Where to write a snapshot of CUDA's allocator; ignored on other devices.
    """
    step.run()
    with MemoryTracker(step.model, step.optimizer, keep_timeline=True) as tracker:
        tracker.reset_peak()
        step.run()
    at_end = tracker.current
    resident_bytes = at_end.total_bytes - at_end.bytes_by_category.get(GRADIENTS, 0)
    # The profiler would count frees of earlier allocations if an earlier profiler had seen their address.
    step.model.zero_grad(set_to_none=True)
    allocated_bytes = peak_bytes(step.run, step.device, resident_bytes)
    on_cuda = step.device.type == "cuda"
    reserved_bytes = torch.cuda.max_memory_reserved(step.device) if on_cuda else None
    if on_cuda and snapshot is not None:
        record_allocations(step.run, snapshot)
    seen = (*tracker.timeline, tracker.peak, *tracker.peak_by_region.values())
    return MemoryProfile(
        name=step.case.name,
        variant=step.case.variant,
        num_responses=step.case.num_responses,
        facts=step.facts(),
        peak=_with_unseen(tracker.peak, allocated_bytes),
        tracked_bytes=tracker.peak.total_bytes,
        allocated_bytes=allocated_bytes,
        reserved_bytes=reserved_bytes,
        peak_by_region=dict(tracker.peak_by_region),
        prefix_bytes=max(point.bytes_by_category.get(PREFIX_KV, 0) for point in seen),
        prefix_size=step.prefix_size(),
        timeline=tracker.timeline,
        allocator_snapshot=str(snapshot) if on_cuda and snapshot is not None else None,
    )


def profile_cases(
    model: nn.Module,
    cases: Iterable[MemoryCase],
    loss: PreferenceLoss | LossFunction,
    optimizer: torch.optim.Optimizer,
    *,
    snapshots: Path | None = None,
    on_start: Callable[[str], None] = lambda name: None,
) -> tuple[list[MemoryProfile], dict[str, str]]:
    """Profile case after case; a case that does not fit into memory is skipped.

    Args:
        model: An attached model, in training mode, on its device.
        cases: The cases to measure.
        loss: As for `kvpref.forward_backward`.
        optimizer: Part of each step; shared by all cases, like the model.
        snapshots: Folder for the allocator's snapshots, on CUDA.
        on_start: Called with the name of the case that runs next.

    Returns:
        The profiles, and case -> reason for those skipped.
    """
    profiles: list[MemoryProfile] = []
    skipped: dict[str, str] = {}
    for case in cases:
        on_start(case.name)
        path = None if snapshots is None else snapshots / f"{case.name.replace(' ', '_')}.pickle"
        try:
            profiles.append(profile_step(ProfiledStep(model, loss, optimizer, case), snapshot=path))
        except torch.OutOfMemoryError as error:
            skipped[case.name] = f"out of device memory: {str(error).splitlines()[0]}"
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return profiles, skipped


def record_allocations(run: Callable[[], object], path: Path) -> None:
    """Write a log of CUDA's allocator during a call, with stack traces, for https://pytorch.org/memory_viz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(max_entries=MAX_HISTORY_ENTRIES)
    try:
        run()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _with_unseen(peak: MemorySnapshot, allocated_bytes: int) -> MemorySnapshot:
    """The tracker's peak, with the allocator's excess over it as ``other``."""
    unseen = max(0, allocated_bytes - peak.total_bytes)
    held = dict(peak.bytes_by_category)
    held[OTHER] = held.get(OTHER, 0) + unseen
    return replace(peak, total_bytes=peak.total_bytes + unseen, bytes_by_category=held)
