"""Checks that every layer took part in a pass: one that did not may have mixed tokens of different sequences."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import nn

from kvpref.errors import UnsupportedModelError

_checked: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()
"""Per model, the modules already found to be complete."""


_PER_TOKEN = frozenset({"NemotronHMLP", "NemotronHMoE"})
"""Classes of a layer's `mixer` that mix no tokens."""

_TO_IMAGES = frozenset({"MllamaCrossAttentionDecoderLayer"})
"""Layers whose tokens attend to images but not to one another."""


def check_all_took_part(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Check that if some layers of a list attended, all of them did.

    Args:
        model: The model that ran a pass.
        modules: The modules that took part.

    Raises:
        UnsupportedModelError: Naming the first layer that did not.
    """
    known = _checked.get(model)
    if known is not None and len(known) == len(modules) and all(map(_is, known, modules)):
        return
    taken = set(map(id, modules))
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        took_part = [_is_per_token(layer) or any(id(module) in taken for module in layer.modules()) for layer in stack]
        if any(took_part) and not all(took_part):
            index = took_part.index(False)
            raise UnsupportedModelError(
                f"layer {name}.{index} ({type(stack[index]).__name__}) mixes tokens in a way kvpref does not follow: "
                "neither its attention goes through transformers' attention interface, nor is it a recurrent layer "
                "that kvpref knows"
            )
    _checked[model] = list(modules)


def _is(first: nn.Module, second: nn.Module) -> bool:
    return first is second


def _is_per_token(layer: nn.Module) -> bool:
    return type(getattr(layer, "mixer", None)).__name__ in _PER_TOKEN or type(layer).__name__ in _TO_IMAGES
