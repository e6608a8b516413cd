"""A value head beside the LM head, and the copies of modules that PEFT trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from kvpref.errors import InputError
from kvpref.models.partitioned import full_shape
from kvpref.models.support import unwrap

VALUE_HEAD = "value_head"


def add_value_head(model: nn.Module, source: str | Path | None = None) -> nn.Linear:
    """Give a model a value head: a linear layer from hidden states to one number, trained and saved with the model.

    Its input is the hidden state that predicts each scored token, so it sees the tokens before it. Call this before
    creating the optimizer and before PEFT's `get_peft_model`, whose `modules_to_save` then has to name ``value_head``.

    Args:
        model: A causal language model, possibly wrapped.
        source: Folder of a saved model whose value head is loaded; a new one starts at zero.

    Returns:
        The layer, hidden_size -> 1, in the model's dtype and on its device.

    Raises:
        InputError: If the model has a value head already, or `source` holds none that fits.
    """
    inner = unwrap(model)
    if hasattr(inner, VALUE_HEAD):
        raise InputError(f"{type(inner).__name__} has a {VALUE_HEAD} already")
    embeddings: Any = inner.get_output_embeddings()
    head = nn.Linear(full_shape(embeddings.weight)[1], 1).to(embeddings.weight)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if source is not None:
        _load(head, Path(source))
    inner.add_module(VALUE_HEAD, head)
    return head


def value_head(model: PreTrainedModel) -> nn.Module:
    """The model's value head, or PEFT's trained copy of it.

    Raises:
        InputError: If there is none.
    """
    head = trained_copy(getattr(model, VALUE_HEAD, None))
    if head is None:
        raise InputError("the loss reads values, and the model has no value head; call kvpref.add_value_head(model)")
    return head


def trained_copy(module: Any) -> Any:
    """The copy of a module that PEFT trains (`modules_to_save`), or the original if adapters are off."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    return module.original_module if module.disable_adapters else copies[module.active_adapters[0]]


def holds_value_head(folder: str | Path) -> bool:
    """Whether a folder holds the value head of a saved model."""
    return bool(_saved_weights(Path(folder)))


def _load(head: nn.Linear, folder: Path) -> None:
    try:
        head.load_state_dict(_saved_weights(folder))
    except RuntimeError as error:
        raise InputError(f"{folder}: holds no {VALUE_HEAD} that fits the model: {error}") from error


def _saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                _, marker, rest = name.rpartition(f"{VALUE_HEAD}.")
                if marker:
                    found[rest] = file.get_tensor(name)
    return found
