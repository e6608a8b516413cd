"""Which sequences of a batch are preferred, from labels or scores, and the metrics of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpref.errors import InputError
from kvpref.losses.scores import known_scores
from kvpref.plan.batch import Batch
from kvpref.records.groups import Group


def pair_indices(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of each group's chosen and rejected sequence, two (num_groups,) int64 tensors on the batch's device.

    Raises:
        InputError: If a group is not a pair with one preferred sequence.
    """
    return batch.tensors(_pair_indices)


def _pair_indices(groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    best = torch.tensor([preferred_of_pair(group) for group in groups])
    starts = 2 * torch.arange(len(groups))
    return starts + best, starts + 1 - best


def pair_metrics(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The metrics of pairs: means without gradient, each (), of rewards and log-probs, each (num_groups,)."""
    margins = chosen_rewards.detach() - rejected_rewards.detach()
    return {
        "rewards/chosen": chosen_rewards.detach().mean(),
        "rewards/rejected": rejected_rewards.detach().mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).to(margins.dtype).mean(),
        "logps/chosen": chosen_logps.detach().mean(),
        "logps/rejected": rejected_logps.detach().mean(),
    }


_ONE = (
    "give `chosen` and `rejected`, or use a loss on single responses: kto and apo_zero_unpaired read labels, sft none"
)
_MANY = (
    "use a loss on N responses (best_vs_rest compares the best by its score with each other one, all_pairs every two, "
    "plackett_luce the whole order), or keep two of each prompt, as `chosen` and `rejected`"
)


def preferred_of_pair(group: Group) -> int:
    """Index of the preferred sequence of a pair.

    Raises:
        InputError: If the group is not a pair, or neither labels nor scores prefer one of the two.
    """
    if len(group) != 2:
        remedy = _ONE if len(group) == 1 else _MANY
        raise InputError(
            f"{group.id}: a pairwise loss needs exactly 2 responses per prompt, this group has {len(group)}; {remedy}"
        )
    first, second = group.labels or known_scores(group) or (None, None)
    if first is None or second is None or first == second:
        raise InputError(f"{group.id}: cannot tell which response is preferred; give labels or two different scores")
    return 0 if first > second else 1


def best_sequence(group: Group) -> int:
    """Index of the group's chosen sequence, or of its best-scored one (the first of equals).

    Raises:
        InputError: If a group of several sequences has neither labels nor scores.
    """
    if len(group) == 1:
        return 0
    if group.labels is not None and any(group.labels):
        return group.labels.index(True)
    rated = {index: score for index, score in enumerate(known_scores(group) or ()) if score is not None}
    if not rated:
        raise InputError(f"{group.id}: no response is labelled as chosen and none has a score, so none is the best")
    return max(rated, key=rated.__getitem__)
