"""TRL's losses and generation on a model whose weights FSDP2 or DeepSpeed ZeRO-3 spreads over ranks.

TRL calls the wrapped model, and all passes over a batch run inside. Their number differs from rank to rank, as does
that of generation steps, so weights are gathered once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from kvpref.models.partitioned import has_partitioned
from kvpref.models.support import unwrap
from kvpref.models.vision.parts import vision_parts
from kvpref.parallel.deepspeed import held, is_engine, whole_weights
from kvpref.parallel.fsdp2_groups import fsdp2_modules
from kvpref.parallel.fsdp2_shards import shards_of
from kvpref.parallel.wrapping import wrapper_of


def weights_kept(model: nn.Module) -> AbstractContextManager[None]:
    """While open, weights are gathered once for any number of forward passes without gradient."""
    if fsdp2_modules(model):
        return _kept_by_fsdp2(model)
    return whole_weights(_inside_engine(model)) if has_partitioned(model) else nullcontext()


def keep_weights_in_forward(model: nn.Module | None) -> None:
    """Make each forward of a model without gradient, such as a reference, gather ZeRO-3's weights once."""
    if model is None or not has_partitioned(model):
        return
    forward = model.forward

    def gathering(*args: Any, **kwargs: Any) -> Any:
        with weights_kept(model):
            return forward(*args, **kwargs)

    model.forward = gathering


def loss_of_passes(model: nn.Module, mode: str, compute: Callable[[nn.Module], Any], passes: ExitStack) -> Any:
    """A loss, or a loss and outputs, whose backward pass reduces all gradients once, at its end.

    Args:
        model: The model prepared for training; one with whole weights is left alone.
        mode: How batches run.
        compute: Computes the loss with the model it is given, which it may call any number of times.
        passes: Closed after the backward pass, if there is one.
    """
    if fsdp2_modules(model):
        return _loss_by_fsdp2(model, mode, lambda: compute(model))
    if not (has_partitioned(model) or _goes_past(model)):
        return compute(model)
    if not torch.is_grad_enabled():
        with weights_kept(model):
            return compute(_inside_engine(model))
    passes.enter_context(wrapper_of(model).step(trains=True))
    return compute(_inside_engine(model))


@contextmanager
def past_engine(model: nn.Module, accelerator: Any) -> Iterator[ExitStack]:
    """Wraps a training step whose backward passes bypass DeepSpeed's engine, which then reduces their gradients.

    Args:
        model: The model prepared for training; one that does not need this is left alone.
        accelerator: Runs the backward pass.
    """
    if not _goes_past(model):
        yield ExitStack()
        return
    engine: Any = model
    is_last = accelerator.sync_gradients
    # accelerate's lets the engine run it.
    accelerator.backward = lambda loss, **kwargs: loss.backward()
    try:
        with nullcontext() if is_last else held(engine), ExitStack() as passes:
            yield passes
    finally:
        del accelerator.backward
    if is_last:
        engine.step()  # together with the optimizer; transformers leaves it to accelerate's backward


def _goes_past(model: nn.Module) -> bool:
    """Whether a model is a DeepSpeed engine whose own backward pass must be bypassed.

    That is so if weights are sharded, or if there is a vision tower, for which ranks without images have no gradients.
    """
    return is_engine(model) and (has_partitioned(model) or bool(vision_parts(unwrap(model)).weights))


def _inside_engine(model: nn.Module) -> nn.Module:
    inside: Any = model.module if is_engine(model) else model
    return inside  # type: ignore[no-any-return]


def _loss_by_fsdp2(model: nn.Module, mode: str, compute: Callable[[], Any]) -> Any:
    shards = shards_of(model)
    if mode != "two_pass" and not shards.sees_images:
        return compute()  # each layer runs once per forward, as FSDP2 expects
    begun = shards.begin(keeps_weights=True, keeps_grads=True)
    try:
        result = compute()
    except BaseException:
        shards.end()
        raise
    loss, *others = result if isinstance(result, tuple) else (result,)
    if torch.is_grad_enabled() and loss.requires_grad:
        loss = shards.reduced_by_backward({"loss": loss})["loss"]
    elif begun:
        shards.end()
    return (loss, *others) if isinstance(result, tuple) else loss


@contextmanager
def _kept_by_fsdp2(model: nn.Module) -> Iterator[None]:
    shards = shards_of(model)
    begun = shards.begin(keeps_weights=True, keeps_grads=False)
    try:
        yield
    finally:
        if begun:
            shards.end()
