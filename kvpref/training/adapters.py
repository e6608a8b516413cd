"""What the trainer has to know of a PEFT adapter: what it does to the model now, and what training will change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.errors import InputError
from kvpref.models.backbone import text_backbone
from kvpref.models.support import unwrap
from kvpref.models.vision.parts import text_prefix, vision_parts

ALL_LINEAR = "all-linear"
"""What PEFT calls every linear layer but the output."""

# Weights that PEFT trains in place of the base model's, whatever the method; a method's own have its prefix.
_COPIED = ("modules_to_save.", "trainable_tokens_delta")


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT wraps the model, so that its adapter can be switched off."""
    return hasattr(model, "disable_adapter")


def is_adapter_weight(model: nn.Module, name: str) -> bool:
    """Whether the parameter `name` is the adapter's: switched off, it does not count."""
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
    """Whether switching the adapter off leaves nothing that training changes (biases, say)."""
    return all(is_adapter_weight(model, name) for name, item in model.named_parameters() if item.requires_grad)


@torch.no_grad()
def adapter_is_fresh(model: nn.Module) -> bool:
    """Whether the adapter leaves the model as it is without: every ``B`` of LoRA is zero, every copy an original.

    False for methods other than LoRA and its relatives, whose beginnings are not looked into.
    """
    # A tied head's original is the embeddings' weight, which is listed once without duplicates, under their name.
    weights = dict(model.named_parameters(remove_duplicate=False))
    changes = [name for name in weights if is_adapter_weight(model, name)]
    ups = [name for name in changes if "lora_B" in name or "lora_embedding_B" in name]
    copies = [name for name in changes if "modules_to_save." in name]
    others = [name for name in changes if "lora_" not in name and name not in copies]
    if others or not changes:
        return False
    return not any(weights[name].any() for name in ups) and all(
        torch.equal(weights[name], weights[_original(name)]) for name in copies
    )


def _original(name: str) -> str:
    """``head.modules_to_save.default.weight`` to ``head.original_module.weight``."""
    before, _, after = name.partition("modules_to_save.")
    return f"{before}original_module.{after.partition('.')[2]}"


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapter; afterwards the same parameters are trainable as before.

    PEFT makes every weight of the active adapter trainable when it switches it on again, also what was frozen.
    """
    flags = [(item, item.requires_grad) for item in model.parameters()]
    disable: Any = model.disable_adapter
    try:
        with disable():
            yield
    finally:
        for item, flag in flags:
            item.requires_grad_(flag)


def trainable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: item for name, item in model.named_parameters() if item.requires_grad}


def find_targets(model: nn.Module, names: str) -> str | list[str]:
    """What PEFT calls the modules that get LoRA weights.

    Args:
        model: Without adapter.
        names: `ALL_LINEAR`, of a model that sees images those of its language model; or names of modules separated by
            commas, wherever they are.

    Raises:
        InputError: If the model has no such module.
    """
    targets = [name.strip() for name in names.split(",") if name.strip()]
    if targets in ([], [ALL_LINEAR]):
        return _linear_of_language_model(unwrap(model))
    modules = dict(model.named_modules())
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            linear = {name.rpartition(".")[2] for name, item in modules.items() if _is_linear(item)}
            raise InputError(
                f"lora_target_modules: the model has no module {target!r}; its linear layers: "
                f"{', '.join(sorted(linear))}"
            )
    return targets


def _linear_of_language_model(model: PreTrainedModel) -> str:
    if not vision_parts(model).weights:
        return ALL_LINEAR
    linear = {name.rpartition(".")[2] for name, item in text_backbone(model).named_modules() if _is_linear(item)}
    return rf"{re.escape(text_prefix(model))}\..*\.({'|'.join(sorted(linear))})"


def _is_linear(module: nn.Module) -> bool:
    # Conv1D is GPT-2's own kind of linear layer.
    return type(module).__name__ in ("Linear", "Conv1D")
