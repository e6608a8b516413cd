"""Refuses reference settings that do not fit one another, and data that a second model cannot read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from kvpref.data import PreferenceDataset
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss, loss_name
from kvpref.models.partitioned import full_shape
from kvpref.models.support import unwrap
from kvpref.models.vision.tower import has_tower
from kvpref.parallel.sharding import is_sharded, will_be_sharded
from kvpref.training.adapters import check_adapters, is_peft, trains_adapter_only
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.loading.selection import check_lengths

Given = nn.Module | str | None
"""The second model, its name, or None."""


def check_reference_settings(
    policy: nn.Module, args: PreferenceTrainingArguments, loss: PreferenceLoss, given: Given
) -> None:
    """Check that the reference arguments fit the loss, the model and one another.

    Raises:
        InputError: For the first that does not.
    """
    check_adapters(policy)
    if not loss.needs_reference and (given is not None or args.reference_sync_steps is not None):
        raise InputError(
            f"loss {loss_name(loss)!r} reads no reference; leave reference_model and reference_sync_steps out"
        )
    for reason in (*_against_base(policy, args, given), *_against_device(policy, args, given)):
        raise InputError(reason)
    if args.reference_device is not None:
        refuse_sharded(policy, "reference_device")
    if args.reference_sync_steps is not None:
        refuse_sharded(policy, "reference_sync_steps")
        for reason in _against_sync(policy, args, given):
            raise InputError(reason)


def _against_base(policy: nn.Module, args: PreferenceTrainingArguments, given: Given) -> Iterator[str]:
    if args.reference != "base":
        return
    if given is not None or not is_peft(policy):
        yield (
            "reference='base' is a PEFT model with its adapter switched off; it goes with a PEFT model and without "
            "reference_model"
        )
    if not args.precompute_reference and not trains_adapter_only(policy):
        yield (
            "training changes weights outside the adapter (biases, or layers made trainable by hand), which switching "
            "the adapter off does not restore; use precompute_reference=True, or reference_model"
        )


def _against_device(policy: nn.Module, args: PreferenceTrainingArguments, given: Given) -> Iterator[str]:
    if args.reference_device is not None and given is None and (is_peft(policy) or args.precompute_reference):
        yield "reference_device is for a second model, and here the policy gives its own reference; leave it out"


def _against_sync(policy: nn.Module, args: PreferenceTrainingArguments, given: Given) -> Iterator[str]:
    if not is_peft(policy):
        return
    if given is not None or args.reference == "base":
        yield (
            "reference_sync_steps with a PEFT model keeps a copy of the adapter as the reference; leave "
            "reference_model and reference='base' out"
        )
    if args.reference_sync_alpha != 1:
        yield (
            "with a PEFT model reference_sync_alpha must be 1: mixing the factors of two adapters is not mixing the "
            "weights that they stand for"
        )


def refuse_sharded(policy: nn.Module, what: str) -> None:
    """Raise InputError if the policy's weights are, or will be, spread over ranks."""
    if will_be_sharded() or is_sharded(policy):
        raise InputError(
            f"{what} needs whole weights, and a sharded model (FSDP, DeepSpeed ZeRO-3) has them in pieces; use "
            "DistributedDataParallel, or precomputed reference log-probs"
        )


def check_reference_data(dataset: PreferenceDataset, model: nn.Module, policy: nn.Module) -> None:
    """Raise InputError for the first group that the reference cannot read: too long, with images or unknown tokens."""
    check_lengths(dataset, model)
    if dataset.images and not has_tower(unwrap(model)):
        for group in dataset:
            if any(part.images for part in group.parts):
                raise InputError(
                    f"{group.id}: holds images, and {type(unwrap(model)).__name__}, the reference, reads none; give a "
                    "reference that sees what the policy sees, or leave reference_model out"
                )
    num_embeddings = _num_embeddings(model)
    if num_embeddings >= _num_embeddings(policy):
        return
    for group in dataset:
        largest = max(int(part.ids.max()) for part in group.parts)
        if largest >= num_embeddings:
            raise InputError(
                f"{group.id}: token {largest} is not in the reference model's vocabulary of {num_embeddings}; the "
                "reference must know the policy's tokens"
            )


def _num_embeddings(model: nn.Module) -> int:
    weight = unwrap(model).get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return full_shape(weight)[0]
