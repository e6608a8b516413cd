"""`attach`: make a Hugging Face model run kvpref's passes. Explicit, idempotent, and per model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from kvpref.errors import InputError, UnsupportedModelError
from kvpref.models import attention as interface
from kvpref.models.head_form import verify_head
from kvpref.models.mixers.forwards import attach_mixers
from kvpref.models.output_layer import head_weights
from kvpref.models.partitioned import gathered
from kvpref.models.support import SAFE_FALLBACK, check_architecture, is_padded_only, unwrap

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")

Program = Callable[[PreTrainedModel], R]


def attach(model: M, *, listed_only: bool = True, padded_only: bool = False) -> M:
    """`kvpref.attach` without comparing numbers.

    Args:
        model: A causal language model of a supported family, possibly inside PEFT.
        listed_only: Whether to refuse families that nobody has checked; a caller that allows them has to compare.
        padded_only: Whether to allow families that are exact in mode ``padded`` only, for that mode.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: If results would not be exact; the message says why and what works instead.
    """
    inner = unwrap(model)
    if is_attached(inner):
        return model
    check_architecture(inner, listed_only=listed_only, padded_only=padded_only)
    with gathered(head_weights(inner)):
        verify_head(inner)
    if is_padded_only(inner.config):
        _accept_programs(inner, inner.config._attn_implementation)
        return model
    attach_mixers(inner)
    interface.register()
    _own_config(inner)
    name = interface.attention_name(inner)
    before = interface.select(inner, name)
    if not interface.is_selected(inner.config):
        raise UnsupportedModelError(
            f"{type(inner).__name__} does not route attention through transformers' attention interface. "
            f"{SAFE_FALLBACK.capitalize()}"
        )
    _accept_programs(inner, before)
    return model


def detach(model: PreTrainedModel) -> None:
    """Undo `attach` on an unwrapped model."""
    forward: Any = model.__dict__.pop("forward")
    if forward.patched is not None:
        model.forward = forward.patched
    interface.deselect(model, forward.attention_before)


def is_attached(model: PreTrainedModel) -> bool:
    # Pickling a model drops the patched forward but keeps the attention's name. For mixed precision, accelerate wraps
    # the patched forward in one that passes programs on.
    forward: Any = model.__dict__.get("forward")
    while forward is not None and not getattr(forward, "accepts_programs", False):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None and (interface.is_selected(model.config) or is_padded_only(model.config))


def run_inside(model: nn.Module, program: Program[R]) -> R:
    """Run `program` on the Hugging Face model inside the (possibly wrapped) model's forward.

    Distributed wrappers gather parameters and synchronise gradients around `forward`, so everything that touches
    parameters (all passes and the LM head) must happen inside one.

    Raises:
        InputError: If the model was not attached.
    """
    if not is_attached(unwrap(model)):
        raise InputError("this model is not attached; call kvpref.attach(model) first")
    result: R = model(kvpref_program=program)
    return result


def _own_config(model: PreTrainedModel) -> None:
    """Copy the model's config: it stores the attention name, and models may share it."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in copies:
            module.config = copies[id(config)]


def _accept_programs(model: PreTrainedModel, attention_before: interface.Implementation) -> None:
    """Let the model's forward take a program in place of inputs."""
    # An instance may already have a patched forward (accelerate's hooks do that); it keeps handling inputs.
    patched = model.__dict__.get("forward")

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, kvpref_program: Program[Any] | None = None, **kwargs: Any) -> Any:
        if kvpref_program is not None:
            return kvpref_program(self)
        return patched(*args, **kwargs) if patched is not None else type(self).forward(self, *args, **kwargs)

    notes: Any = forward
    notes.accepts_programs, notes.patched, notes.attention_before = True, patched, attention_before
    model.forward = MethodType(forward, model)
