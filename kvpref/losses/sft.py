"""Supervised fine-tuning on the preferred response, or on all of them by weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from kvpref.errors import InputError
from kvpref.losses.checks import check_choice, check_positive
from kvpref.losses.interface import Idle, LossOutput, PreferenceLoss
from kvpref.losses.learning_rates import LIKELIHOOD_RATES
from kvpref.losses.pairs.preferred import best_sequence
from kvpref.losses.scores import check_not_ranks, has_preference, known_scores, rated_indices, response_scores
from kvpref.plan.batch import Batch
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps, or_one

LEARNS_BAD = (
    "no response is labelled true or scored above 0, and one is learned nevertheless; if they are bad, leave them out, "
    "or use a loss that reads labels: kto, apo_zero_unpaired"
)
"""The caution of losses that raise a likelihood, whatever the response is worth."""


@dataclass(frozen=True, kw_only=True)
class SFT(PreferenceLoss):
    """Negative log-likelihood per token of each group's chosen (or best-scored) response."""

    average: str = "token"
    """``token``: the mean over all tokens of the optimizer step, as in ordinary causal language-model training.
    ``response``: the mean over responses of the mean over their tokens, so that long ones do not count more."""

    learning_rates = LIKELIHOOD_RATES

    def __post_init__(self) -> None:
        check_choice("sft", ("token", "response"), average=self.average)

    @property
    def unit(self) -> str:  # type: ignore[override]
        return "tokens" if self.average == "token" else "groups"

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        best = batch.tensors(_best_indices)
        if self.average == "response":
            loss = -policy.mean()[best].mean()
        else:
            loss = -policy.sum()[best].sum() / or_one(policy.total_weights()[best].sum())
        return LossOutput(loss=loss, metrics={"nll_per_token": loss.detach()})

    def group_units(self, group: Group) -> float:
        """Scored tokens of the chosen response (the sum of their weights), or 1."""
        return 1 if self.average == "response" else group.sequences[best_sequence(group)].total_weight

    def caution(self, group: Group) -> str | None:
        return LEARNS_BAD if _is_bad(group, best_sequence(group)) else None

    def select(self, group: Group) -> Group:
        return group.take([best_sequence(group)])

    def prepare_batch(self, batch: Batch) -> None:
        batch.tensors(_best_indices)


def _best_indices(groups: Sequence[Group]) -> torch.Tensor:
    """The index of each group's best sequence among all, (num_groups,) int64."""
    starts = accumulate(map(len, groups), initial=0)
    return torch.tensor([start + best_sequence(group) for start, group in zip(starts, groups, strict=False)])


@dataclass(frozen=True, kw_only=True)
class WeightedSFT(PreferenceLoss):
    """Weighted mean of the negative log-likelihood per token of a group's responses: ``sum_i w_i nll_i / sum_i w_i``.

    Reward-weighted regression, Peters and Schaal 2007 (ICML); scores of 0 and 1 give the rejection-sampling
    fine-tuning of Yuan et al. 2023 (arXiv 2308.01825): the mean over the right responses. A group whose weights are
    all 0 is not a unit of the mean.
    """

    weights: str = "scores"
    """w: ``scores``, which must not be negative, ``softmax`` of the scores in the group, or the name of a column of the
    data with a number per response, not negative."""

    temperature: float = 1.0
    """Scores are divided by it before the softmax; the smaller, the more the best response counts."""

    learning_rates = LIKELIHOOD_RATES

    def __post_init__(self) -> None:
        check_positive("weighted_sft", temperature=self.temperature)
        if self.weights != "softmax" and self.temperature != 1:
            raise InputError("weighted_sft: temperature is for weights='softmax'")

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.weights in ("scores", "softmax") else (self.weights,)

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        nll = -policy.mean()
        total = (batch.tensors(_shares, self).to(nll.dtype) * nll).sum()
        loss = total / max(1, self.num_units(batch))
        return LossOutput(loss=loss, metrics={"nll_per_token": loss.detach()})

    def group_units(self, group: Group) -> int:
        """1 for a group with a weight above 0."""
        return int(any(self._shares(group)))

    def idle(self, group: Group) -> Idle | None:
        if any(self._shares(group)):
            return None
        return Idle("all weights are 0", "give at least one response a weight above 0, or set weights='softmax'")

    def caution(self, group: Group) -> str | None:
        """The softmax of equal scores weighs bad responses as it does good ones."""
        if self.weights != "softmax" or has_preference(group):
            return None
        return LEARNS_BAD if _is_bad(group, rated_indices(group)[0]) else None

    def select(self, group: Group) -> Group:
        """The responses whose weight is above 0; a single response if there are none."""
        return group.take([index for index, share in enumerate(self._shares(group)) if share > 0] or [0])

    def prepare_batch(self, batch: Batch) -> None:
        batch.tensors(_shares, self)

    def _shares(self, group: Group) -> list[float]:
        """The share of each response in its group's mean: they sum to 1, or all are 0. Unrated responses have 0."""
        weights = (
            _softmax(response_scores(group), self.temperature) if self.weights == "softmax" else self._given(group)
        )
        total = sum(weights)
        return [weight / total if total else 0.0 for weight in weights]

    def _given(self, group: Group) -> list[float]:
        if self.weights == "scores":
            check_not_ranks(group, "weighted_sft with weights='scores'")
            weights = [0.0 if score is None else score for score in response_scores(group)]
        else:
            column: Any = group.columns.get(self.weights)
            if not group.is_per_sequence(column) or not all(isinstance(item, int | float) for item in column):
                raise InputError(
                    f"{group.id}: weighted_sft needs a column {self.weights!r} with one number per response "
                    f"({len(group)}); found {column!s:.60}"
                )
            weights = list(map(float, column))
        if min(weights) < 0:
            hint = "; weights='softmax' takes any score" if self.weights == "scores" else ""
            raise InputError(
                f"{group.id}: the weights of weighted_sft must not be negative; found {min(weights)}{hint}"
            )
        return weights


def _is_bad(group: Group, index: int) -> bool:
    """Whether a response is labelled false, or has a score, which is not above 0; in rows of data labels are scores."""
    if group.labels is not None:
        return not group.labels[index]
    scores = None if group.ranks is not None else known_scores(group)
    score = None if scores is None else scores[index]
    return score is not None and score <= 0


def _shares(groups: Sequence[Group], loss: WeightedSFT) -> torch.Tensor:
    """(num_sequences,) float64."""
    return torch.tensor([share for group in groups for share in loss._shares(group)], dtype=torch.float64)


def _softmax(scores: tuple[float | None, ...], temperature: float) -> list[float]:
    """exp(score / temperature) up to a factor that keeps the largest at 1; 0 where unrated."""
    top = max(score for score in scores if score is not None)
    return [0.0 if score is None else math.exp((score - top) / temperature) for score in scores]
