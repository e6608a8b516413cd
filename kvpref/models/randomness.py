"""Settings of a module that make two forwards of the same token differ."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_NAMES = ("drop", "jitter")


def random_numbers(module: nn.Module) -> Iterator[tuple[str, float]]:
    """Nonzero dropout, layer drop and router jitter settings of a module, by attribute name.

    Child modules such as `nn.Dropout` are not searched.
    """
    for name, value in vars(module).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value > 0 and any(word in name for word in _NAMES):
            yield name, value
