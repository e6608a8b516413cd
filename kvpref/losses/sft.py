"""Supervised fine-tuning on the preferred response."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpref.batch import Batch
from kvpref.groups import Group
from kvpref.losses.interface import LossOutput, PreferenceLoss
from kvpref.losses.pairs import best_sequence
from kvpref.outputs import ResponseLogps


@dataclass(frozen=True, kw_only=True)
class SFT(PreferenceLoss):
    """Negative log-likelihood per token of each group's chosen (or best-scored) response.

    The mean runs over all tokens of the optimizer step, as in ordinary causal language-model training.
    """

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        best = torch.tensor(_best_indices(batch), device=batch.device)
        num_tokens = policy.lengths()[best].sum()
        best_sums = policy.sum()[best]
        loss = -best_sums.sum() / num_tokens
        return LossOutput(loss=loss, metrics={"nll_per_token": loss.detach()})

    def num_units(self, batch: Batch) -> int:
        """Scored tokens of the chosen responses."""
        return sum(sum(batch.sequences[index].scored) for index in _best_indices(batch))

    def select(self, group: Group) -> Group:
        best = best_sequence(group)
        return Group([group.sequences[best]], labels=[True], id=group.id)


def _best_indices(batch: Batch) -> list[int]:
    indices: list[int] = []
    start = 0
    for group in batch.groups:
        indices.append(start + best_sequence(group))
        start += len(group)
    return indices
