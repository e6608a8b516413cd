"""DeepSpeed ZeRO 1, 2 and 3: passes bypass the engine, which then reduces the accumulated gradients once.

The engine's hooks expect one forward and one backward pass per call of the engine. kvpref makes several, of parts of a
layer's outputs, and not equally many on all ranks. So while passes run, DeepSpeed's hooks are removed from the model,
whose weights are whole on every rank: with ZeRO 1 and 2 they always are; ZeRO-3 gathers them once, before the first
pass, and releases them after the last. Gradients accumulate in `.grad` as without DeepSpeed, and no collective depends
on how many passes a rank makes. Then the engine averages them, and gives each rank its part
(`coalesce_grad_reduction`).
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from kvpref.errors import UnsupportedModelError
from kvpref.models.attach import Program, run_inside
from kvpref.models.partitioned import gathered, has_partitioned
from kvpref.models.support import unwrap
from kvpref.parallel.deepspeed_limits import check_engine
from kvpref.parallel.plain import Wrapper

R = TypeVar("R")

_OPEN = "_kvpref_passes_run"
_HELD = "_kvpref_holds_gradients"
_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_engine(model: nn.Module) -> bool:
    """Whether a model is DeepSpeed's engine."""
    return type(model).__name__ == "DeepSpeedEngine"


def is_deepspeed(model: nn.Module) -> bool:
    """Whether DeepSpeed wraps a model, or has partitioned its weights."""
    return is_engine(model) or has_partitioned(model)


class DeepSpeedWrapper(Wrapper):
    """DeepSpeed's engine, or the model inside one."""

    def __init__(self, model: nn.Module) -> None:
        self._engine: Any = model if is_engine(model) else None
        if self._engine is not None:
            check_engine(self._engine)
        inner: Any = model if self._engine is None else self._engine.module
        super().__init__(inner)
        self._inner = unwrap(self.model)  # one for all wrappers of a model

    def run_whole(self, program: Program[R], *, several_passes: bool) -> R:
        if torch.is_grad_enabled() and not hasattr(self._inner, _OPEN):
            # A user's own loop: the engine's forward and backward gather, reduce and release.
            return run_inside(self.model if self._engine is None else self._engine, program)
        with self.whole():
            return run_inside(self.model, program)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        with self.step(trains=True):
            yield

    def run_chunk(self, program: Program[R]) -> R:
        return run_inside(self.model, program)

    @contextmanager
    def step(self, *, trains: bool) -> Iterator[None]:
        if not trains:
            with self.whole():
                yield
            return
        engine = self._engine
        if engine is None:
            raise UnsupportedModelError(
                "training needs DeepSpeed's engine, and this is the model inside one; pass what deepspeed.initialize "
                "(or accelerate's prepare) returned"
            )
        is_last = not getattr(engine, _HELD, False)
        with self.whole():
            yield
            if is_last:
                self._fill()
        if is_last:
            engine.set_gradient_accumulation_boundary(True)
            with engine.coalesce_grad_reduction():
                pass  # its end reduces `.grad`

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While open, weights are whole on every rank, and the model has none of DeepSpeed's hooks. May be nested."""
        if hasattr(self._inner, _OPEN):
            yield
            return
        with gathered(self.model.parameters()), _without_hooks(self.model):
            setattr(self._inner, _OPEN, True)
            try:
                yield
            finally:
                delattr(self._inner, _OPEN)

    def _fill(self) -> None:
        """Fill missing gradients with zeros: all ranks must reduce the same weights."""
        for weight in self.model.parameters():
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)

    def discard(self) -> None:
        for weight in self.model.parameters():
            weight.grad = None


def whole_weights(model: nn.Module) -> AbstractContextManager[None]:
    """While open, ranks may run any number of ZeRO-3's passes; opening it gathers the weights on all ranks together."""
    return DeepSpeedWrapper(model).whole() if is_deepspeed(model) else nullcontext()


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """While open, steps keep their gradients on their rank; the next step outside reduces them with its own."""
    setattr(model, _HELD, True)
    try:
        yield
    finally:
        delattr(model, _HELD)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """While open, a model has none of DeepSpeed's hooks; other hooks stay."""
    with ExitStack() as stack:
        for module in model.modules():
            for name in _MODULE_HOOKS:
                stack.enter_context(_filtered(getattr(module, name)))
        for weight in model.parameters():
            stack.enter_context(_filtered(weight._post_accumulate_grad_hooks))
        yield


@contextmanager
def _filtered(hooks: MutableMapping[int, Any] | None) -> Iterator[None]:
    """Remove DeepSpeed's hooks from the mapping while open, and restore their places afterwards."""
    if not hooks or not any(map(_is_deepspeeds, hooks.values())):
        yield
        return
    before = dict(hooks)
    for key, hook in before.items():
        if _is_deepspeeds(hook):
            del hooks[key]
    try:
        yield
    finally:
        added = {key: hook for key, hook in hooks.items() if key not in before}
        kept = {key: hook for key, hook in before.items() if key in hooks or _is_deepspeeds(hook)}
        hooks.clear()
        hooks.update(kept | added)


def _is_deepspeeds(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")
