"""Memory during training: how much was held, and what to do if there is not enough."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvpref.engine.options import EngineOptions
from kvpref.parallel.gathering import gather
from kvpref.tracing import observe_marks

_CPU_OUT_OF_MEMORY = "can't allocate memory"


class MemoryMeter:
    """Peak memory and bytes of prefix caches between two log lines.

    Args:
        device: The model's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held_bytes = self._peak_held_bytes = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the keys and values that the engine keeps inside."""
        with observe_marks(self._note):
            yield

    def _note(self, kind: str, tensors: tuple[torch.Tensor, ...]) -> None:
        if kind != "prefix K/V":
            return
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._held_bytes += storage.nbytes()
            weakref.finalize(storage, self._forget, storage.nbytes()).atexit = False
        self._peak_held_bytes = max(self._peak_held_bytes, self._held_bytes)

    def _forget(self, num_bytes: int) -> None:
        self._held_bytes -= num_bytes

    def pop(self, world_size: int) -> dict[str, float]:
        """Peaks since the last call, in bytes, on the rank that held most. All ranks have to call it.

        ``peak_memory_bytes`` is the most that PyTorch's allocator held on CUDA; on a CPU, the largest resident set of
        the process so far. ``prefix_cache_bytes`` is the most that keys and values of prefixes took. With several
        ranks, ``peak_memory_rank`` is the one with the largest peak.
        """
        ranks = gather(self._pop_own(), world_size)
        peaks = {name: max(own[name] for own in ranks) for name in ranks[0]}
        if world_size > 1:
            peaks["peak_memory_rank"] = max(range(world_size), key=lambda rank: ranks[rank]["peak_memory_bytes"])
        return peaks

    def _pop_own(self) -> dict[str, float]:
        peaks = {"prefix_cache_bytes": float(self._peak_held_bytes)}
        self._peak_held_bytes = self._held_bytes
        if self._device.type == "cuda":
            peaks["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            peaks["peak_memory_bytes"] = float(_peak_resident_bytes())
        return peaks


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the host is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _CPU_OUT_OF_MEMORY in str(error)
    )


def advice(options: EngineOptions, max_tokens_per_micro_batch: int | None) -> str:
    """What to change so that a step takes less memory, cheapest change first."""
    changes = []
    if options.mode in ("packed", "padded"):
        changes.append("use mode two_pass, which stores shared prompts once")
    if options.schedule == "bounded":
        changes.append(f"lower max_tokens_per_chunk (now {options.chunk_tokens}; --auto-budget does so by itself)")
    elif options.mode != "two_pass":
        changes.append("with mode two_pass, use schedule bounded, whose memory does not grow with the responses")
    else:
        changes.append("use schedule bounded, whose memory does not grow with the number of responses")
    changes.append(f"lower max_tokens_per_micro_batch (now {max_tokens_per_micro_batch or 'without bound'})")
    if options.checkpoint != "all":
        changes.append("set checkpoint all")
    if options.schedule == "bounded" and options.prefix_cache == "device":
        changes.append("set prefix_cache cpu")
    return "; ".join(changes)
