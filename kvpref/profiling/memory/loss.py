"""A loss for measuring memory: groups of any size, with or without scores, and no reference model."""

from __future__ import annotations

import torch

from kvpref.losses import LossOutput
from kvpref.plan.batch import Batch
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps


def weighted_likelihood(policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
    """Minus the responses' log-probs, each weighted by ``(1 + score - mean score of its group) / N``; mean over groups.

    A policy gradient with the group's mean as baseline, plus a likelihood that keeps gradients nonzero if all scores
    are equal or missing. Unrated responses count as average ones. `reference` is ignored.
    """
    weights = [weight for group in batch.groups for weight in response_weights(group)]
    sums = policy.sum()
    loss = -(torch.tensor(weights, device=sums.device, dtype=sums.dtype) * sums).sum() / batch.num_groups
    return LossOutput(loss=loss, metrics={})


def response_weights(group: Group) -> list[float]:
    """The weight of each response of a group; they sum to 1."""
    scores = group.scores or (None,) * len(group)
    rated = [score for score in scores if score is not None]
    mean = sum(rated) / max(1, len(rated))
    return [(1.0 if score is None else 1.0 + score - mean) / len(group) for score in scores]
