"""Which attention backend `auto` takes on the devices of this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpref.ops.attention.backends import choose_automatically

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HEAD_DIM = 128
NO_MEMORY = "not known: no memory is left on the device for a tiny call; end what else runs there"
"""Stands in for an answer."""


@dataclass(frozen=True, kw_only=True)
class DeviceChoice:
    """One answer, for all devices of the same name."""

    device: str
    """Name of the GPU, or ``cpu``."""

    dtypes: tuple[str, ...]
    """Dtypes of queries with this answer."""

    takes: str
    """The backend with its package, and why not a preferred one."""


def automatic_choices() -> list[DeviceChoice]:
    """The choice for every device and each training dtype, with a head dim of 128."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", index) for index in range(num_gpus)]
    found: dict[tuple[str, str], dict[str, None]] = {}
    for device in [*devices, torch.device("cpu")]:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        for dtype in _DTYPES:
            try:
                takes = str(choose_automatically(torch.empty(1, 1, _HEAD_DIM, dtype=dtype, device=device)))
            except torch.OutOfMemoryError:
                takes = NO_MEMORY
            found.setdefault((name, takes), {})[str(dtype).removeprefix("torch.")] = None
    return [DeviceChoice(device=name, dtypes=tuple(dtypes), takes=takes) for (name, takes), dtypes in found.items()]
