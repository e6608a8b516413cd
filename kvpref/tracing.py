"""Named regions of a training step and named tensors, to which profilers attribute time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.profiler import record_function

PREFIX = "kvpref: "
"""Prefix of region names in traces of `torch.profiler`."""

_current: ContextVar[str | None] = ContextVar("kvpref_region", default=None)


@contextmanager
def region(name: str) -> Iterator[None]:
    """Name the code that runs inside, for `current_region` and in traces of `torch.profiler`.

    The engine names ``vision tower``, ``pass 0``, ``pass 1``, ... (one per depth of the prefix tree), ``lm head``,
    ``loss`` and ``backward``; the innermost name counts.
    """
    token = _current.set(name)
    try:
        with record_function(PREFIX + name):
            yield
    finally:
        _current.reset(token)


def current_region() -> str | None:
    """The innermost region of this thread; None outside any."""
    return _current.get()


Observer = Callable[[str, tuple[torch.Tensor, ...]], None]

# Not a ContextVar: gradients of CUDA tensors arrive on autograd's own threads.
_observers: list[Observer] = []


def mark(kind: str, *tensors: torch.Tensor) -> None:
    """Tell observers what kind of data tensors hold.

    The engine marks ``prefix K/V``, ``prefix K/V gradients``, ``log-probs``, ``pixel inputs``, ``image features``,
    ``image feature gradients``, and ``gradients`` that it makes itself.
    """
    for observer in _observers:
        observer(kind, tensors)


@contextmanager
def observe_marks(observer: Observer) -> Iterator[None]:
    """Call ``observer(kind, tensors)`` for every `mark` inside, on any thread."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
