"""The trainer's defaults for settings that were not given."""

from __future__ import annotations

import multiprocessing
import shutil
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from kvpref.data.batching.budgets import default_budget
from kvpref.errors import InputError
from kvpref.models.support import unwrap
from kvpref.models.vision.parts import vision_parts
from kvpref.training.adapters import is_peft, trains_adapter_only

if TYPE_CHECKING:
    from kvpref.data import PreferenceDataset
    from kvpref.losses import PreferenceLoss
    from kvpref.training.arguments import PreferenceTrainingArguments

AUTO: Literal["auto"] = "auto"
"""Lets `token_budget` choose the token budget."""


SHARED_MEMORY = Path("/dev/shm")
"""Holds what data workers send until it is received."""

_SHARED_BYTES = 2**30
"""Bytes that waiting steps may take, with room to spare; containers often have 64 MiB."""


def default_workers(*, on_cpu: bool) -> int:
    """The default number of data workers.

    One worker plans and collates ahead of a GPU, so that the process that feeds it does nothing else. A thread does it
    (0) if the CPU trains, if a worker could not be forked and so would load everything again, or if shared memory is
    short.
    """
    if on_cpu or multiprocessing.get_start_method() != "fork" or not SHARED_MEMORY.is_dir():
        return 0
    return int(shutil.disk_usage(SHARED_MEMORY).free >= _SHARED_BYTES)


def with_defaults(
    args: PreferenceTrainingArguments, loss: PreferenceLoss, model: nn.Module
) -> PreferenceTrainingArguments:
    """A copy of the arguments with defaults that depend on the loss and the model; given values are kept."""
    resolved = copy(args)
    if args.learning_rate is None:
        resolved.learning_rate = loss.learning_rates.rate(adapter_only=trains_an_adapter(model))
    if args.max_tokens_per_micro_batch == AUTO and loss.couples_groups:
        # Splitting into micro-batches would change the loss, which a default must not do.
        resolved.max_tokens_per_micro_batch = None
    if args.ddp_find_unused_parameters is None:
        # Searching for unused parameters walks the graph in each step. Text uses every trainable parameter; a
        # micro-batch without images uses no tower.
        resolved.ddp_find_unused_parameters = not args.freeze_vision and _trains_vision(model)
    return resolved


def _trains_vision(model: nn.Module) -> bool:
    return any(weight.requires_grad for weight in vision_parts(unwrap(model)).weights.values())


def trains_an_adapter(model: nn.Module) -> bool:
    """Whether only an adapter is trained."""
    return is_peft(model) and trains_adapter_only(model)


def check_token_budget(budget: int | str | None) -> None:
    """Raise InputError if it is not a valid token budget."""
    is_number = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
    if not is_number and budget not in (AUTO, None):
        raise InputError(
            f"max_tokens_per_micro_batch must be a number of at least 1, {AUTO!r}, or None for no bound; got {budget!r}"
        )


def token_budget(
    args: PreferenceTrainingArguments, groups: PreferenceDataset | None, *, whole_segments: bool = False
) -> int | None:
    """Most tokens of a micro-batch, counted as the mode counts them; None for no bound.

    A default does not refuse data: it is at least what the largest group takes.

    Args:
        args: Arguments with the given budget, or `AUTO`.
        groups: The groups to be cut into micro-batches.
        whole_segments: As for `PreferenceDataset.batching_lengths`.
    """
    budget = args.max_tokens_per_micro_batch
    if not isinstance(budget, str):
        return budget
    if groups is None:
        return default_budget((), args.mode)
    limits = (args.min_shared_tokens, args.max_prefix_depth)
    return default_budget(groups.batching_lengths(*limits, whole_segments=whole_segments), args.mode)
