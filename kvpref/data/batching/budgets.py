"""The default token budget of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable

from kvpref.data.batching.costs import COUNTS
from kvpref.data.batching.lengths import GroupLengths

DEFAULT_MAX_TOKENS = 8192
"""Tokens that fill most devices; more do not make a step faster, but need more memory."""


def default_budget(lengths: Iterable[GroupLengths], mode: str) -> int:
    """`DEFAULT_MAX_TOKENS`, or what the largest group takes in `mode` if that is more."""
    return max(DEFAULT_MAX_TOKENS, *(COUNTS[mode](group)[0] for group in lengths), 0)
