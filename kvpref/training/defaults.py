"""What the trainer takes for settings that nobody gave."""

from __future__ import annotations

from copy import copy
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
"""The token budget that `token_budget` chooses."""


def with_defaults(
    args: PreferenceTrainingArguments, loss: PreferenceLoss, model: nn.Module
) -> PreferenceTrainingArguments:
    """The arguments with what follows from the loss and the model; those that were given stay, and so does `args`."""
    resolved = copy(args)
    if args.learning_rate is None:
        resolved.learning_rate = loss.learning_rates.rate(adapter_only=trains_an_adapter(model))
    if args.max_tokens_per_micro_batch == AUTO and loss.couples_groups:
        # A cut would change the loss, which a default must not do.
        resolved.max_tokens_per_micro_batch = None
    if args.ddp_find_unused_parameters is None:
        # Looking for them walks the graph in each step. Text needs every trainable parameter; a micro-batch without
        # images needs no tower.
        resolved.ddp_find_unused_parameters = not args.freeze_vision and _trains_vision(model)
    return resolved


def _trains_vision(model: nn.Module) -> bool:
    return any(weight.requires_grad for weight in vision_parts(unwrap(model)).weights.values())


def trains_an_adapter(model: nn.Module) -> bool:
    """Whether an adapter is all that is trained."""
    return is_peft(model) and trains_adapter_only(model)


def check_token_budget(budget: int | str | None) -> None:
    """Raise InputError if it is none."""
    is_number = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
    if not is_number and budget not in (AUTO, None):
        raise InputError(
            f"max_tokens_per_micro_batch must be a number of at least 1, {AUTO!r}, or None for no bound; got {budget!r}"
        )


def token_budget(args: PreferenceTrainingArguments, groups: PreferenceDataset | None) -> int | None:
    """Most tokens of a micro-batch, counted as the mode counts them; None for no bound.

    A default does not refuse data: it is at least what the largest group takes.

    Args:
        args: With the budget that was given, or `AUTO`.
        groups: Those that are to be cut into micro-batches.
    """
    budget = args.max_tokens_per_micro_batch
    if not isinstance(budget, str):
        return budget
    lengths = groups.batching_lengths(args.min_shared_tokens, args.max_prefix_depth) if groups is not None else ()
    return default_budget(lengths, args.mode)
