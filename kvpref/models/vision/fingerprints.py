"""Which of several images have the same pixels, found on the pixels' device without copying them to the host.

Each gets a fingerprint on its device, and images with equal fingerprints are compared bit by bit, so that equal keys
mean equal pixels. The host waits twice, for a few numbers per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

Inputs = Mapping[str, torch.Tensor]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Values widened at once: enough to keep a device busy, few enough not to matter.
_CHUNK = 1 << 21
# Odd 64-bit numbers whose bits look random (of the golden ratio, and of the finaliser of SplitMix64).
_GOLDEN, _MIXER = -7046029254386353131, -4658895280553007687


def image_keys(images: Sequence[Inputs]) -> list[str]:
    """One key per image, equal exactly if all inputs have equal names, shapes, dtypes and bits."""
    devices = dict.fromkeys(value.device for image in images for value in image.values())
    weights = _Weights()
    parts = [
        _on_host([_fingerprint(_inputs_on(device, image), device, weights) for image in images]) for device in devices
    ]
    keys = ["-".join([_form(image), *map(_hexadecimal, own)]) for image, *own in zip(images, *parts, strict=True)]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    again = [index for index, key in enumerate(keys) if first[key] != index]
    pairs = [(images[index], images[first[keys[index]]]) for index in again]
    flags = [_on_host([_equal(_inputs_on(device, one), other) for one, other in pairs]) for device in devices]
    for index, *same in zip(again, *flags, strict=True):
        if not all(same):  # a collision has never been seen, but would make features silently wrong
            keys[index] += f":{index}"
    return keys


def _on_host(values: list[torch.Tensor]) -> list[Any]:
    found: list[Any] = torch.stack(values).tolist() if values else []
    return found


def _inputs_on(device: torch.device, image: Inputs) -> Inputs:
    return {name: value for name, value in image.items() if value.device == device}


def _hexadecimal(sums: list[int]) -> str:
    return "".join(f"{number & (1 << 64) - 1:016x}" for number in sums)


def _form(image: Inputs) -> str:
    return ",".join(f"{name}{tuple(value.shape)}{value.dtype}" for name, value in sorted(image.items()))


class _Weights:
    """Odd factors for values, by position; made once per device."""

    def __init__(self) -> None:
        self._known: dict[torch.device, torch.Tensor] = {}

    def of(self, count: int, device: torch.device) -> torch.Tensor:
        """(2, count) int64, for two sums."""
        known = self._known.get(device)
        if known is None or known.shape[1] < count:
            places = torch.arange(2 * count, device=device).view(count, 2).T
            mixed = places * _GOLDEN
            mixed = (mixed ^ (mixed >> 31)) * _MIXER
            known = self._known[device] = (mixed ^ (mixed >> 29)) | 1
        return known[:, :count]


def _fingerprint(image: Inputs, device: torch.device, weights: _Weights) -> torch.Tensor:
    """The fingerprint of inputs, (2,) int64, on their device."""
    total = torch.zeros(2, dtype=torch.int64, device=device)
    for number, (_, value) in enumerate(sorted(image.items())):
        for place, chunk in enumerate(_bits(value).split(_CHUNK)):
            sums = (chunk.to(torch.int64) * weights.of(len(chunk), device)).sum(dim=1)
            # A different factor for each chunk and input, so that swapping two changes the result.
            factor = (place * 2 + 1) * _GOLDEN + number * _MIXER * 2
            total += sums * ((factor | 1) % (1 << 63))
    return total


def _bits(value: torch.Tensor) -> torch.Tensor:
    """An input as integers, of eight bytes each if the size allows."""
    flat = value.detach().contiguous().flatten()
    size = flat.element_size()
    if flat.numel() * size % 8:
        return flat.view(_INTEGERS[size])
    aligned = flat if flat.storage_offset() * size % 8 == 0 else flat.clone()
    return aligned.view(torch.int64)


def _equal(one: Inputs, other: Inputs) -> torch.Tensor:
    """() bool: whether two inputs of the same shapes have the same bits."""
    return torch.stack([(_bits(value) == _bits(other[name])).all() for name, value in sorted(one.items())]).all()
