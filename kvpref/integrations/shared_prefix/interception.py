"""Replace the `forward` of one module, and undo it without a trace."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Handler = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]


class Interception:
    """A module's `forward` that asks a handler first, until `close`.

    Set on the instance, because wrappers (PEFT, TRL) call `module.forward` directly and bypass hooks. Others may patch
    `forward` before or after; the handler gets to call whatever was there before. Copies and pickles of the module do
    not have it.

    Args:
        module: The module whose `forward` is replaced.
        handler: Called with the previous forward, the positional and the keyword arguments. Of several interceptions
            on one module only the latest one's is called.
    """

    def __init__(self, module: nn.Module, handler: Handler) -> None:
        # Others read signature, name and attributes from `forward`; set before own attributes, which may exist.
        functools.update_wrapper(self, module.forward)
        self._module = module
        self._handler: Handler | None = handler
        self._saved: Forward | None = module.__dict__.get("forward")
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._handler is None:  # closed, but still called by a later patch
            return self._bound(self._saved)(*args, **kwargs)
        below = self._saved
        while isinstance(below, Interception):
            below = below._saved
        return self._handler(self._bound(below), args, kwargs)

    def close(self) -> None:
        """Restore the module's previous `forward`; under a later patch, only step aside."""
        self._handler = None
        if self._module.__dict__.get("forward") is not self:
            return
        below = self._saved
        while isinstance(below, Interception) and below._handler is None:
            below = below._saved
        if below is None:
            del self._module.forward
        else:
            self._module.forward = below

    def _bound(self, saved: Forward | None) -> Forward:
        """`saved`, or the forward of the module's class, which FSDP changes."""
        return MethodType(type(self._module).forward, self._module) if saved is None else saved

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        if self._saved is not None:
            return copy.deepcopy(self._saved, memo)
        module = copy.deepcopy(self._module, memo)  # the copy under way, from the memo
        return MethodType(type(module).forward, module)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, "forward")  # found on the class while the instance is being unpickled
