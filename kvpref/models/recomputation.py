"""Makes gradient checkpointing tell recomputed layers which pass they belong to, and where in it they are.

transformers' checkpointed layers call their own `_gradient_checkpointing_func`; while a pass runs it
gets a `context_fn` (see `torch.utils.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn

from kvpref.models.running_pass import RunningPass
from kvpref.state.cache import LayerSlot

FUNCTION = "_gradient_checkpointing_func"

Context = AbstractContextManager[Any]
ContextFn = Callable[[], tuple[Context, Context]]


@contextmanager
def recomputed_within(model: nn.Module, running: RunningPass) -> Iterator[None]:
    """While a pass runs, let layers that a checkpoint recomputes later find it again."""
    layers = [module for module in model.modules() if _is_checkpointed(module)]
    with checkpoint_contexts(layers, lambda given: partial(_contexts, running, given)):
        yield


@contextmanager
def checkpoint_contexts(layers: Iterable[nn.Module], wrap: Callable[[ContextFn | None], ContextFn]) -> Iterator[None]:
    """Give checkpointed layers a `context_fn`, made by `wrap` from their own, which is restored afterwards."""
    before = [(layer, vars(layer).get(FUNCTION)) for layer in layers]
    for layer, _ in before:
        function = getattr(layer, FUNCTION)
        given = getattr(function, "keywords", {}).get("context_fn")
        vars(layer)[FUNCTION] = partial(function, context_fn=wrap(given))
    try:
        yield
    finally:
        for layer, function in before:
            if function is None:
                del vars(layer)[FUNCTION]
            else:
                vars(layer)[FUNCTION] = function


def _is_checkpointed(module: nn.Module) -> bool:
    # Recomputation inside a compiled graph does not run as Python again.
    return (
        module.training
        and getattr(module, "gradient_checkpointing", False)
        and module._compiled_call_impl is None
        and hasattr(module, FUNCTION)
    )


def _contexts(running: RunningPass, given: ContextFn | None) -> tuple[Context, Context]:
    """The contexts for a checkpointed layer's first run and for its recomputation."""
    first, again = (None, None) if given is None else given()
    start = _Start(running, first)
    return start, _Again(start, again)


class _Start:
    """Notes where a pass is when a layer begins."""

    def __init__(self, running: RunningPass, given: Context | None) -> None:
        self.running, self._given = running, given
        self.place: LayerSlot | None = None

    def __enter__(self) -> None:
        self.place = self.running.place
        if self._given is not None:
            self._given.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return None if self._given is None else self._given.__exit__(kind, error, traceback)


class _Again:
    """Takes the pass back there, each time the layer is recomputed."""

    def __init__(self, start: _Start, given: Context | None) -> None:
        self._start, self._given = start, given
        self._stack = ExitStack()

    def __enter__(self) -> None:
        assert self._start.place is not None
        self._stack.enter_context(self._start.running.recomputed_from(self._start.place))
        if self._given is not None:
            self._stack.enter_context(self._given)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, traceback)
