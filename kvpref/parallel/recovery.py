"""Steps that all ranks repeat if they fail on one: ranks ask one another before each collective.

A failing rank says so, and then waits for what the others do next; no rank may be in a collective of the step by then,
since the failed rank never joins it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kvpref.parallel.agreement import Agreement, agreement


class FailedElsewhereError(RuntimeError):
    """Another rank failed in this step."""


class Repeatable:
    """One attempt at a repeatable step.

    Attributes:
        is_over: Whether all ranks have passed the last point at which they ask.
    """

    def __init__(self, among: Agreement) -> None:
        self._agreement, self.is_over = among, False

    def ask(self, *, is_last: bool) -> None:
        """Raise FailedElsewhereError if another rank has failed; `is_last` marks the last collective of the step."""
        if self._agreement.any(False):
            raise FailedElsewhereError("another rank failed in this step")
        self.is_over = is_last

    def fail(self) -> None:
        """Tell the others, which are about to ask."""
        self._agreement.any(True)


_running: ContextVar[Repeatable | None] = ContextVar("kvpref_repeatable", default=None)


@contextmanager
def repeatable() -> Iterator[Repeatable]:
    """Wraps a step that all ranks repeat if it fails on one."""
    step = Repeatable(agreement())
    token = _running.set(step)
    try:
        yield step
    finally:
        _running.reset(token)


def before_collective(*, is_last: bool = False) -> None:
    """Call this before a collective: in a repeatable step, it checks that no rank has failed.

    Args:
        is_last: Whether this is the last collective of the step.

    Raises:
        FailedElsewhereError: If another rank has failed.
    """
    step = _running.get()
    if step is not None:
        step.ask(is_last=is_last)
