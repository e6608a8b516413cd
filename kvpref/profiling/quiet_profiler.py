"""PyTorch's profiler without what its C++ part (kineto) prints of its own on stderr."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch.profiler import ProfilerActivity, profile

_LEVEL, _NOTHING = "KINETO_LOG_LEVEL", "6"
# Kineto counts verbose, info, warning, error, stage, USDT. The last one, `profiler_start`, is printed at every start.


def quiet_profile(activities: Iterable[ProfilerActivity], *, profile_memory: bool = False) -> profile:
    """`torch.profiler.profile`, of which only Python's errors and warnings are heard.

    Kineto reads its level from the environment when the first profiler of a process starts; one that the user has set
    is left as it is.

    Args:
        activities: As for `torch.profiler.profile`.
        profile_memory: Likewise.
    """
    os.environ.setdefault(_LEVEL, _NOTHING)
    return profile(activities=activities, profile_memory=profile_memory)
