"""Settings of a module by which two forwards of one token differ."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_NAMES = ("drop", "jitter")


def random_numbers(module: nn.Module) -> Iterator[tuple[str, float]]:
    """Numbers above 0 that a module keeps under the name of a dropout, a layer drop or a router's jitter.

    Modules of their own, such as `nn.Dropout`, are not looked into.
    """
    for name, value in vars(module).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value > 0 and any(word in name for word in _NAMES):
            yield name, value
