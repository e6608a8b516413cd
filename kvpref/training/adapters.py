"""What the trainer has to know about a PEFT adapter: its effect on the model now, and what training will change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kvpref.errors import InputError
from kvpref.models.partitioned import gathered
from kvpref.parallel.whole_weights import whole

# Weights that PEFT trains in place of the base model's, for every method; a method's own weights have its prefix.
_COPIED = ("modules_to_save.", "trainable_tokens_delta")


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT wraps the model, so that its adapter can be switched off."""
    return hasattr(model, "disable_adapter")


def is_adapter_weight(model: nn.Module, name: str) -> bool:
    """Whether the parameter `name` belongs to the adapter, so that switching the adapter off excludes it."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    marks = (*_COPIED, prefix) if isinstance(prefix, str) else _COPIED
    return is_peft(model) and any(mark in name for mark in marks)


def check_adapters(model: nn.Module) -> None:
    """Raise InputError if several adapters are active at once."""
    active: Any = getattr(model, "active_adapters", ()) if is_peft(model) else ()
    if len(active) > 1:
        raise InputError(
            f"the adapters {', '.join(active)} are all active; training wants one: call model.set_adapter(name), or "
            "merge the others with merge_and_unload"
        )


def trains_adapter_only(model: nn.Module) -> bool:
    """Whether training changes nothing outside the adapter, such as biases."""
    return all(is_adapter_weight(model, name) for name, item in model.named_parameters() if item.requires_grad)


@torch.no_grad()
def adapter_is_fresh(model: nn.Module) -> bool:
    """Whether the adapter has no effect yet: every ``B`` of LoRA is zero, every copied module equals its original.

    False for methods other than LoRA and its relatives, whose initial state is not examined.
    """
    # A tied head's original is the embeddings' weight, which is listed only once, under their name.
    weights = dict(model.named_parameters(remove_duplicate=False))
    changes = [name for name in weights if is_adapter_weight(model, name)]
    ups = [name for name in changes if "lora_B" in name or "lora_embedding_B" in name]
    copies = [name for name in changes if "modules_to_save." in name]
    others = [name for name in changes if "lora_" not in name and name not in copies]
    if others or not changes:
        return False
    # For sharded weights, every rank has to ask for all of them, whatever it finds.
    with gathered(weights[name] for name in (*ups, *copies, *map(_original, copies))):
        moved = [bool(whole(weights[name]).any()) for name in ups]
        same = [torch.equal(whole(weights[name]), whole(weights[_original(name)])) for name in copies]
    return not any(moved) and all(same)


def _original(name: str) -> str:
    """``head.modules_to_save.default.weight`` to ``head.original_module.weight``."""
    before, _, after = name.partition("modules_to_save.")
    return f"{before}original_module.{after.partition('.')[2]}"


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapter off while open; afterwards the same parameters are trainable as before.

    When PEFT switches it on again, it makes every weight of the active adapter trainable, even frozen ones.
    """
    before = dict(model.named_parameters())
    flags = {name: item.requires_grad for name, item in before.items()}
    disable: Any = model.disable_adapter
    try:
        with disable():
            yield
    finally:
        # While a sharded model's weights are gathered, it holds other parameter objects.
        for parameters in (before, dict(model.named_parameters())):
            for name, item in parameters.items():
                item.requires_grad_(flags[name])


def trainable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: item for name, item in model.named_parameters() if item.requires_grad}
