"""The token budget that fits into a GPU's free memory, as predicted by `kvpref plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from kvpref.cli.run_config import RunConfig
from kvpref.cli.sizes import size_in_words
from kvpref.data import PreferenceDataset, summarize_dataset
from kvpref.data.batching.costs import COUNTS
from kvpref.engine.options import EngineOptions
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss
from kvpref.models.lora_targets import ALL_LINEAR
from kvpref.models.support import unwrap
from kvpref.profiling.prediction.fit import largest_fitting, num_tokens
from kvpref.profiling.prediction.images import most_images
from kvpref.profiling.prediction.model import TrainingSetup
from kvpref.profiling.prediction.peak import Predictor
from kvpref.profiling.prediction.step import GroupShape
from kvpref.training import PreferenceTrainingArguments
from kvpref.training.adapters import is_peft
from kvpref.training.defaults import AUTO

USED_SHARE = 0.85
"""Share of the free memory to use; the rest is for fragmentation and for whatever predictions do not cover."""

RESERVE_BYTES = 2**30
"""Memory reserved for kernels' workspaces and communication."""

_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "sgd": "sgd"}
"""transformers' name -> the name in plans."""


@dataclass(frozen=True, kw_only=True)
class FittingBudget:
    """A budget that fits."""

    max_tokens: int | None
    """The budget; None to leave the default."""

    note: str
    """The prediction, in words."""


def choose_budget(
    model: PreTrainedModel,
    run: RunConfig,
    args: PreferenceTrainingArguments,
    loss: PreferenceLoss,
    groups: PreferenceDataset,
) -> str | None:
    """Set the budget in `args` to the largest that fits, if none was given and the device is a GPU.

    Returns:
        The prediction of the peak; None if nothing was predicted.
    """
    if args.device.type != "cuda" or args.max_tokens_per_micro_batch != AUTO or loss.couples_groups:
        return None
    # Every rank must cut the same way, so the one with the least memory decides.
    free: Any = gather_object([torch.cuda.mem_get_info(args.device)[0]])
    found = fitting_budget(model, run, args, loss, groups, min(free))
    if found.max_tokens is not None:
        args.max_tokens_per_micro_batch = found.max_tokens
    return found.note


def fitting_budget(
    model: PreTrainedModel,
    run: RunConfig,
    args: PreferenceTrainingArguments,
    loss: PreferenceLoss,
    groups: PreferenceDataset,
    free_bytes: int,
) -> FittingBudget:
    """The largest budget whose micro-batches fit, up to a whole step of the data's longest groups.

    Args:
        model: The model, not yet on the device.
        run: The run's settings, for the adapter.
        args: The run's arguments, with the default budget.
        loss: The loss.
        groups: The training data.
        free_bytes: The device's free memory, the same number on every rank.
    """
    reason = _unpredictable(model, run, args, loss)
    if reason is not None:
        return FittingBudget(max_tokens=None, note=f"peak not predicted: {reason}")
    usable = int(USED_SHARE * free_bytes) - RESERVE_BYTES
    if args.world_size > 1:
        # DistributedDataParallel sends copies of the gradients.
        usable -= sum(item.nbytes for item in model.parameters() if item.requires_grad)
    shape = _longest(groups)
    variant = EngineOptions(mode=args.mode, checkpoint=args.checkpoint)
    try:
        predictor = Predictor(unwrap(model).config, _setup(model, run, args))
        peak_of = _peaks(predictor, variant, shape)
        resident = predictor.peak(variant, shape).resident_bytes
        limit = args.per_device_train_batch_size
        largest = largest_fitting(peak_of, usable, resident_bytes=resident, first=limit, limit=limit).number
    except InputError as error:
        return FittingBudget(max_tokens=None, note=f"peak not predicted: {error}")
    lengths = groups.batching_lengths(args.min_shared_tokens, args.max_prefix_depth)
    least = max(COUNTS[args.mode](counts)[0] for counts in lengths)
    if not largest:
        return FittingBudget(
            max_tokens=least,
            note=f"predicted peak {size_in_words(peak_of(1))} of {size_in_words(free_bytes)} free for the longest "
            "group alone; if memory runs out: --checkpoint all, --schedule bounded, or --lora-r 16",
        )
    return FittingBudget(
        max_tokens=max(least, largest * num_tokens(args.mode, shape)),
        note=f"predicted peak {size_in_words(peak_of(largest))} of {size_in_words(free_bytes)} free",
    )


def predict_peak(
    model: nn.Module,
    run: RunConfig,
    args: PreferenceTrainingArguments,
    loss: PreferenceLoss,
    groups: PreferenceDataset,
    budget: int | None,
) -> str:
    """The peak of a micro-batch filled up to the budget with groups like the data's longest, in words.

    Args:
        model: The model.
        run: The run's settings, for the adapter.
        args: The run's arguments.
        loss: The loss.
        groups: The training data.
        budget: Tokens of a micro-batch; None for a whole step.
    """
    reason = _unpredictable(model, run, args, loss)
    if reason is not None:
        return f"peak not predicted: {reason}"
    shape, count = _longest(groups), args.per_device_train_batch_size
    if budget is not None:
        count = min(count, max(1, budget // num_tokens(args.mode, shape)))
    try:
        predictor = Predictor(unwrap(model).config, _setup(model, run, args))
        peak_bytes = predictor.peak(EngineOptions(mode=args.mode, checkpoint=args.checkpoint), shape, count).total_bytes
    except InputError as error:
        return f"peak not predicted: {error}"
    return f"predicted peak {size_in_words(peak_bytes)}"


def _unpredictable(
    model: nn.Module, run: RunConfig, args: PreferenceTrainingArguments, loss: PreferenceLoss
) -> str | None:
    """Why the peak cannot be predicted; None if it can."""
    reasons = {
        "in the bounded schedule a chunk bounds memory": args.schedule != "full",
        "reward models are not predicted": loss.reads == "ends",
        "value heads are not predicted": loss.head.values,
        f"the state of {args.optim} is not known": _optimizer(args) not in _OPTIMIZERS,
        "the adapter was not made here": is_peft(model) and run.lora_r is None,
        "a second model is in memory": loss.needs_reference and not args.precompute_reference,
        "shares of sharded models are not known": bool(args.fsdp or args.deepspeed),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _optimizer(args: PreferenceTrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _setup(model: nn.Module, run: RunConfig, args: PreferenceTrainingArguments) -> TrainingSetup:
    weights: Any = unwrap(model)
    return TrainingSetup(
        dtype=weights.dtype,
        mixed_precision=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        optimizer=_OPTIMIZERS[_optimizer(args)],
        lora_r=run.lora_r,
        lora_target_modules=run.lora_target_modules or ALL_LINEAR,
        device_type="cpu" if args.device.type == "cpu" else "cuda",
    )


def _longest(groups: PreferenceDataset) -> GroupShape:
    """The shape of a group at least as large as any in every respect."""
    found, start = summarize_dataset(groups), most_images(groups)
    return GroupShape(
        start=start,
        prompt_tokens=max(1, found.prompt_tokens.max, 0 if start is None else start.num_tokens),
        response_tokens=max(1, found.response_tokens.max),
        num_responses=found.sequences_per_group.max,
    )


def _peaks(predictor: Predictor, variant: EngineOptions, shape: GroupShape) -> Callable[[int], int]:
    return lambda num_groups: predictor.peak(variant, shape, num_groups).total_bytes
