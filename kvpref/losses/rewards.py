"""Reward models: losses of the rewards that a scalar head gives each response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, mse_loss

from kvpref.errors import InputError
from kvpref.losses.checks import check_choice, check_not_negative
from kvpref.losses.interface import LossOutput, RewardLoss
from kvpref.losses.ranking import mean_over, pair_means, plackett_luce_losses, preference_metrics
from kvpref.losses.scores import (
    ComparesScores,
    RatedResponses,
    check_not_ranks,
    rated_indices,
    rated_responses,
    response_scores,
)
from kvpref.plan.batch import Batch
from kvpref.plan.columns import column_values
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseRewards


@dataclass(frozen=True, kw_only=True)
class RankingRewardLoss(ComparesScores, RewardLoss):
    """Base: a mean over the groups that have a preference of a function of their rewards.

    r_i is the reward of response i and s_i its score. Equal scores say nothing: a group whose scores are all equal is
    not a unit of the mean, and unrated responses are left out.
    """

    def __call__(self, policy: ResponseRewards, reference: None, batch: Batch) -> LossOutput:  # type: ignore[override]
        rated = rated_responses(batch)
        rewards = rated.of(policy.rewards)
        losses = self.group_losses(rewards, rated, batch)
        with torch.no_grad():
            preferences = preference_metrics(rewards, rated)
            metrics = {
                "accuracy": preferences["accuracies"],
                "margin": preferences["margins"],
                "mean_reward": torch.where(rated.rated, rewards, 0).sum(dim=1) / rated.rated.sum(dim=1),
                "min_reward": rewards.masked_fill(~rated.rated, torch.inf).amin(dim=1),
                "max_reward": rewards.masked_fill(~rated.rated, -torch.inf).amax(dim=1),
            }
        counts = rated.better().any(dim=(1, 2))
        return LossOutput(
            loss=mean_over(losses, counts),
            metrics={name: mean_over(value, counts) for name, value in metrics.items()},
        )

    def group_losses(self, rewards: torch.Tensor, rated: RatedResponses, batch: Batch) -> torch.Tensor:
        """The loss of each group, (num_groups,), from the rewards (num_groups, N) of its responses."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(RankingRewardLoss):
    """Bradley-Terry over all pairs: the group's mean of ``-log s(r_i - r_j - m_ij) + c (r_i + r_j)^2``, s_i > s_j.

    Equation 1 of Ouyang et al. 2022 (arXiv 2203.02155); the margin m is that of Touvron et al. 2023 (arXiv 2307.09288),
    equation 2; the centering that of Eisenstein et al. 2023 (arXiv 2312.09244).
    """

    margin_column: str | None = None
    """Column of the data with margins: one number per group, for all its pairs, or one per response; then a pair's
    margin is the difference of the two."""

    center_rewards_coefficient: float = 0.0
    """c, how strongly the rewards of a pair are pulled to a sum of 0; 0.01 is common."""

    def __post_init__(self) -> None:
        check_not_negative("bradley_terry", center_rewards_coefficient=self.center_rewards_coefficient)

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.margin_column is None else (self.margin_column,)

    def prepare_batch(self, batch: Batch) -> None:
        super().prepare_batch(batch)
        if self.margin_column is not None:
            batch.tensors(_are_own, self.margin_column)

    def group_losses(self, rewards: torch.Tensor, rated: RatedResponses, batch: Batch) -> torch.Tensor:
        gaps = rewards[:, :, None] - rewards[:, None, :]
        if self.margin_column is not None:
            gaps = gaps - self._margins(rated, batch, self.margin_column).to(gaps.dtype)
        sums = rewards[:, :, None] + rewards[:, None, :]
        losses = -logsigmoid(gaps) + self.center_rewards_coefficient * sums**2
        return pair_means(losses, rated.better().to(rewards.dtype))

    @staticmethod
    def _margins(rated: RatedResponses, batch: Batch, name: str) -> torch.Tensor:
        """(num_groups, N, N) margin by which response i should lead response j."""
        values = rated.of(batch.sequence_column(name))
        differences = values[:, :, None] - values[:, None, :]
        same = values[:, :1, None]
        return torch.where(batch.tensors(_are_own, name)[:, None, None], differences, same)


def _are_own(groups: Sequence[Group], name: str) -> torch.Tensor:
    """Whether a column holds a number per response of each group, (num_groups,) bool."""
    values = column_values(groups, name)
    return torch.tensor([group.is_per_sequence(value) for group, value in zip(groups, values, strict=True)])


@dataclass(frozen=True, kw_only=True)
class PlackettLuceReward(RankingRewardLoss):
    """Plackett-Luce: ``sum_i log sum_(j = i or s_j < s_i) exp(r_j - r_i)``.

    The negative log-likelihood of a ranking, Plackett 1975; in Zhu et al. 2023 (arXiv 2301.11270) for reward models.
    Each of several equal responses is drawn against those below them, not against one another.
    """

    def group_losses(self, rewards: torch.Tensor, rated: RatedResponses, batch: Batch) -> torch.Tensor:
        return plackett_luce_losses(rewards, rated)


Regression = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _squared_errors(rewards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return mse_loss(rewards, scores, reduction="none")


def _cross_entropies(rewards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return binary_cross_entropy_with_logits(rewards, scores, reduction="none")


REGRESSIONS: dict[str, Regression] = {"mse": _squared_errors, "bce": _cross_entropies}
"""Functions by name: (num_rated,) rewards and scores -> (num_rated,) losses."""


@dataclass(frozen=True, kw_only=True)
class RewardRegression(RewardLoss):
    """Regression of rewards to scores, a mean over the rated responses.

    ``mse``: ``(r_i - s_i)^2``, as in Wang et al. 2024 (HelpSteer2, arXiv 2406.08673). ``bce``:
    ``-s_i log s(r_i) - (1 - s_i) log s(-r_i)`` for scores in [0, 1], as in Cobbe et al. 2021 (arXiv 2110.14168).
    """

    objective: str = "mse"
    """``mse`` or ``bce``."""

    unit = "sequences"

    def __post_init__(self) -> None:
        check_choice("reward_regression", REGRESSIONS, objective=self.objective)

    def __call__(self, policy: ResponseRewards, reference: None, batch: Batch) -> LossOutput:  # type: ignore[override]
        places, scores = batch.tensors(_regressed, self)
        rewards = policy.rewards[places]
        scores = scores.to(rewards.dtype)
        with torch.no_grad():
            predicted = rewards.sigmoid() if self.objective == "bce" else rewards
            metrics = {"mean_reward": rewards.mean(), "mean_error": (predicted - scores).abs().mean()}
        return LossOutput(loss=REGRESSIONS[self.objective](rewards, scores).mean(), metrics=metrics)

    def group_units(self, group: Group) -> int:
        """Rated responses."""
        return len(rated_indices(group))

    def select(self, group: Group) -> Group:
        """The rated responses; scores that cannot be regressed to are refused here, before training."""
        self._check(group)
        return group.take(rated_indices(group))

    def prepare_batch(self, batch: Batch) -> None:
        batch.tensors(_regressed, self)

    def _check(self, group: Group) -> None:
        check_not_ranks(group, "reward_regression")
        if self.objective != "bce":
            return
        outside = [score for score in response_scores(group) if score is not None and not 0 <= score <= 1]
        if outside:
            raise InputError(
                f"{group.id}: reward_regression with objective 'bce' needs scores in [0, 1]; found {outside[0]}"
            )


def _regressed(groups: Sequence[Group], loss: RewardRegression) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the rated responses stand among a batch's sequences, (n,) int64, and their scores, (n,) float64."""
    for group in groups:
        loss._check(group)
    scores = [score for group in groups for score in response_scores(group)]
    rated = [(place, score) for place, score in enumerate(scores) if score is not None]
    return torch.tensor([place for place, _ in rated]), torch.tensor([score for _, score in rated], dtype=torch.float64)
