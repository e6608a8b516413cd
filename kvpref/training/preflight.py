"""Tries, before the first step, everything that can fail when a run is saved."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from kvpref.errors import InputError, RunError
from kvpref.models.partitioned import num_values
from kvpref.models.support import unwrap
from kvpref.training.generation_config import savable_generation_config
from kvpref.training.saving import saving

_TRIAL_FOLDER = "trial-of-saving"
_STATES_OF_ADAM = 2
_GIB = 2**30


def check_saving(trainer: Trainer) -> Iterator[str]:
    """Try saving everything besides the weights, and check that there is room for a checkpoint.

    Yields:
        Lines for the user.

    Raises:
        InputError: If the output folder cannot be written to.
        RunError: If something cannot be saved, or the disk is too full for one checkpoint and the final model.
    """
    args = trainer.args
    folder = Path(args.output_dir or ".")
    trial = folder / _TRIAL_FOLDER
    try:
        shutil.rmtree(trial, ignore_errors=True)  # left by a run that was killed here
        trial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{folder}: the output folder cannot be written to: {error.strerror or error}; choose another one"
        ) from error
    try:
        with saving(args.output_dir, trainer.state.global_step):
            left_out = _try(trainer, trial)
        _check_space(trainer, folder)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(trial)
    if left_out:
        yield (
            f"generation settings that transformers does not save are left out of what is saved: {', '.join(left_out)}"
        )


def _try(trainer: Trainer, folder: Path) -> tuple[str, ...]:
    model: Any = trainer.model
    inner = unwrap(model)
    inner.config.save_pretrained(folder)
    for settings in getattr(model, "peft_config", {}).values():
        settings.save_pretrained(folder)
    with savable_generation_config(inner) as left_out:
        if inner.can_generate():
            inner.generation_config.save_pretrained(folder)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)
    torch.save(trainer.args, folder / "training_args.bin")
    return left_out


def _check_space(trainer: Trainer, folder: Path) -> None:
    args = trainer.args
    model: Any = trainer.model
    weights = weights_bytes(model)
    needed = weights
    if args.save_strategy != SaveStrategy.NO:
        needed += weights + (0 if args.save_only_model else optimizer_bytes(model, OptimizerNames(args.optim).value))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: {free / _GIB:.2f} GiB are free, and a checkpoint and the final model take "
            f"{needed / _GIB:.2f} GiB; make room or choose another output folder"
        )


def weights_bytes(model: nn.Module) -> int:
    """Bytes of the saved weights: for an adapter, without its base model."""
    is_adapter = hasattr(model, "peft_config")
    return sum(
        num_values(item) * item.element_size() for item in model.parameters() if item.requires_grad or not is_adapter
    )


def optimizer_bytes(model: nn.Module, name: str) -> int:
    """Lower bound on the bytes of an optimizer's state: two numbers per trained weight for Adam and its relatives."""
    trained = [item for item in model.parameters() if item.requires_grad]
    if "adam" not in name:
        return 0
    if "8bit" in name or "4bit" in name:
        return sum(map(num_values, trained))
    return sum(_STATES_OF_ADAM * num_values(item) * item.element_size() for item in trained)
