"""Parses and formats memory sizes."""

from __future__ import annotations

import re

from kvpref.errors import InputError

_UNITS = {
    "": 2**30,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
"""Bytes by unit. A bare number is in GiB, like device memory."""


def parse_bytes(text: str, option: str) -> int:
    """``80GiB`` or ``80`` -> bytes.

    Raises:
        InputError: If it is not a number of at least 0 with a known unit.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS:
        raise InputError(f"{option}: expected a size such as 80GiB (or 80), 24GB or 512MiB; got {text!r}")
    return int(float(match[1]) * _UNITS[unit])


def size_in_words(num_bytes: float) -> str:
    """``1.5 GiB``, ``24.8 MiB``."""
    return f"{num_bytes / 2**30:.3g} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.3g} MiB"
