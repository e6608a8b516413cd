"""The types of the trainer's arguments; for each mistake, what to pass instead."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kvpref.errors import InputError
from kvpref.losses import LOSSES, PreferenceLoss
from kvpref.training.arguments import PreferenceTrainingArguments

_WRAPPERS: dict[type[nn.Module], str] = {
    nn.DataParallel: "DataParallel splits batches, which only make sense whole: pass model.module, and start one "
    "process per device with torchrun",
    DistributedDataParallel: "the trainer wraps the model itself: pass model.module",
}
"""Wrappers around a model that do not work, and why."""


def check_types(model: Any, args: Any, loss: Any, reference_model: Any) -> None:
    """Check the types of a trainer's arguments.

    Raises:
        InputError: For the first of a wrong type, with what to do.
    """
    if not isinstance(args, PreferenceTrainingArguments):
        raise InputError(
            f"args must be kvpref.PreferenceTrainingArguments; got {_named(args)}. It takes all of transformers' "
            "TrainingArguments, and loss='dpo' or another"
        )
    _check_model(model, "model", "it")
    if reference_model is not None:
        _check_model(reference_model, "reference_model", "it, or name it in PreferenceTrainingArguments")
    if isinstance(loss, str):
        how = f"loss={loss!r}" if loss in LOSSES else "loss='file.py:function'"
        raise InputError(
            f"loss must be a function or a loss that was made; got {loss!r}. Name it in "
            f"PreferenceTrainingArguments({how})"
        )
    if isinstance(loss, type) and issubclass(loss, PreferenceLoss):
        raise InputError(f"loss is the class {loss.__name__}; make it, with its settings: {loss.__name__}()")
    if loss is not None and not callable(loss):
        raise InputError(f"loss must be a function (policy, reference, batch); got {_named(loss)}")


def _check_model(model: Any, name: str, what: str) -> None:
    for kind, remedy in _WRAPPERS.items():
        if isinstance(model, kind):
            raise InputError(f"{name} is inside {kind.__name__}; {remedy}")
    if hasattr(model, "_orig_mod"):
        raise InputError(
            f"{name} is compiled as a whole, and kvpref compiles layers: pass the model as it was before "
            "torch.compile, and set torch_compile=True"
        )
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{name} must be a model that was loaded; got {_named(model)}. Load {what} with "
            "AutoModelForCausalLM.from_pretrained, or AutoModelForSequenceClassification for losses of rewards"
        )


def _named(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"{type(value).__name__}"
