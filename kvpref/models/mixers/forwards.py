"""Mixers of an attached model: in a pass they see segments of the prefix tree, elsewhere they run as usual."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from kvpref.errors import UnsupportedModelError
from kvpref.models.mixers.call import MixerCall
from kvpref.models.mixers.kinds import KINDS, MixerKind
from kvpref.models.mixers.lightning import lightning_forward
from kvpref.models.mixers.seams import SEAMS
from kvpref.models.running_pass import RunningPass, current_pass

Forward = Callable[..., Any]

_CACHES = ("cache_params", "past_key_values")
_RAN_IN_PASS = "_kvpref_ran_in_pass"


def find_mixers(model: nn.Module) -> Iterator[tuple[str, nn.Module, MixerKind]]:
    """The known mixers of a model, by name."""
    for name, module in model.named_modules():
        kind = KINDS.get(type(module).__name__)
        if kind is not None:
            yield name, module, kind


def attach_mixers(model: nn.Module) -> None:
    """Let the model's mixers take part in passes; idempotent. Outside passes they are unchanged.

    Raises:
        UnsupportedModelError: If a mixer's forward is not the one that kvpref knows.
    """
    found = [item for item in find_mixers(model) if not _is_attached(item[1])]
    made: dict[type[nn.Module], Forward] = {}
    for name, module, kind in found:
        if not _has_own_forward(module):
            raise UnsupportedModelError(
                f"the forward of {name} ({type(module).__name__}) was replaced by hub kernels or by hooks of "
                "accelerate, so kvpref cannot pass it the state of a prompt; load the model without use_kernels and "
                "device_map"
            )
        if type(module) not in made:
            made[type(module)] = _make_forward(type(module), kind)
    for _, module, _ in found:
        module.forward = MethodType(made[type(module)], module)


def _is_attached(mixer: nn.Module) -> bool:
    return getattr(vars(mixer).get("forward"), "takes_part", False)


def _has_own_forward(mixer: nn.Module) -> bool:
    # Pickling drops the forward that `attach_mixers` set and leaves the class's own.
    forward = vars(mixer).get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(mixer).forward


def _make_forward(mixer: type[nn.Module], kind: MixerKind) -> Forward:
    own: Forward = mixer.forward
    inner = inspect.unwrap(own)
    signature = inspect.signature(inner)
    used = _seams(mixer, kind, inner)

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running = current_pass()
        _check_knows_its_pass(self, running)
        if running is None:
            return own(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        for name in _CACHES:
            if bound.arguments.get(name) is not None:
                raise UnsupportedModelError(f"{mixer.__name__} got a cache of its own inside a pass")
        # All ones, or the attention layers' mask.
        if "attention_mask" in signature.parameters:
            bound.arguments["attention_mask"] = None
        hidden_states = bound.arguments["hidden_states"]
        call = running.mixers.call(self, hidden_states.device)
        if kind.seams:
            out = _with_seams(inner, used, call)(*bound.args, **bound.kwargs)
        else:
            out = lightning_forward(self, call, hidden_states)
        running.mixers.leave(self, call)
        return out

    forward.takes_part = True  # type: ignore[attr-defined]
    return forward


def _check_knows_its_pass(mixer: nn.Module, running: RunningPass | None) -> None:
    """Refuse a layer that a checkpoint recomputes outside its pass: it would run as an ordinary one."""
    in_backward = torch._C._current_graph_task_id() != -1
    if running is None and in_backward and getattr(mixer, _RAN_IN_PASS, False):
        raise UnsupportedModelError(
            f"{type(mixer).__name__} is recomputed by a checkpoint other than transformers' own, which does "
            "not pass it its initial state; use gradient_checkpointing_enable, or checkpoint='all'"
        )
    setattr(mixer, _RAN_IN_PASS, running is not None)


def _seams(mixer: type[nn.Module], kind: MixerKind, inner: Forward) -> list[str]:
    """The names of functions to replace in a mixer's forward, after checking that it calls no others."""
    called = {name for name in inner.__code__.co_names if name in inner.__globals__}
    missing = [name for name in kind.seams if name not in called]
    unknown = [name for name in called if name in SEAMS and name not in (*kind.seams, *kind.optional)]
    if missing or unknown:
        raise UnsupportedModelError(
            f"{mixer.__name__} of this release of transformers does not compute its {kind.name} as kvpref knows it "
            f"({'without' if missing else 'with'} {', '.join(missing or unknown)}); use transformers 5.17 to 5.23"
        )
    return [name for name in (*kind.seams, *kind.optional) if name in called]


def _with_seams(inner: Forward, names: list[str], call: MixerCall) -> Forward:
    """The same code with these names bound to other functions."""
    replaced = {name: SEAMS[name](inner.__globals__[name], call) for name in names}
    function = FunctionType(
        inner.__code__, {**inner.__globals__, **replaced}, inner.__name__, inner.__defaults__, inner.__closure__
    )
    function.__kwdefaults__ = inner.__kwdefaults__
    return function
