"""Preferences over any number of responses, ordered by their scores, against a reference.

All of them compare only responses with different scores: equal scores say nothing. A group whose scores are all equal
is not a unit of the mean, and unrated responses are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import softplus

from kvpref.errors import InputError
from kvpref.losses.checks import check_between, check_choice, check_positive
from kvpref.losses.interface import LossOutput
from kvpref.losses.learning_rates import PREFERENCE_RATES
from kvpref.losses.scores import ComparesScores, RatedResponses, check_not_ranks, rated_responses
from kvpref.plan.batch import Batch
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps


@dataclass(frozen=True, kw_only=True)
class RankingLoss(ComparesScores):
    """Base: a mean over the groups that have a preference of a function of their implicit rewards.

    The implicit reward of response i is ``r_i = beta (log pi(i) - log ref(i))``, s_i is its score.
    """

    beta: float = 0.1
    """Strength of the pull towards the reference; the larger, the closer."""

    name: ClassVar[str]
    needs_reference = True
    learning_rates = PREFERENCE_RATES

    def __post_init__(self) -> None:
        check_positive(self.name, beta=self.beta)

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        if reference is None:
            raise InputError(
                f"{self.name} needs reference log-probs; pass `reference`, or train with PreferenceTrainer"
            )
        rated = rated_responses(batch)
        rewards = rated.of(self.beta * (policy.sum() - reference.sum()))
        losses = self.group_losses(rewards, rated)
        with torch.no_grad():
            metrics = preference_metrics(rewards, rated)
        counts = rated.better().any(dim=(1, 2))
        return LossOutput(
            loss=mean_over(losses, counts),
            metrics={f"rewards/{name}": mean_over(value, counts) for name, value in metrics.items()},
        )

    def group_losses(self, rewards: torch.Tensor, rated: RatedResponses) -> torch.Tensor:
        """The loss of each group, (num_groups,), from the implicit rewards (num_groups, N) of its responses."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(RankingLoss):
    """Plackett-Luce DPO: ``sum_i log sum_(j = i or s_j < s_i) exp(r_j - r_i)``.

    Equation 20 (appendix A.3) of Rafailov et al. 2023 (arXiv 2305.18290): a ranking is drawn best first, each place by
    a softmax over what is left. Without ties the two are the same. With ties, each of the equal responses is drawn
    against those below them, not against one another.
    """

    name = "plackett_luce"

    def group_losses(self, rewards: torch.Tensor, rated: RatedResponses) -> torch.Tensor:
        return plackett_luce_losses(rewards, rated)


@dataclass(frozen=True, kw_only=True)
class LiPO(RankingLoss):
    """LiPO-lambda: ``sum_(s_i > s_j) |2^s_i - 2^s_j| |1/log(1 + k_i) - 1/log(1 + k_j)| log(1 + exp(r_j - r_i))``.

    The lambda loss of Liu et al. 2024 (arXiv 2402.01878). k_i = 1, 2, ... is the place of response i among the rated
    ones by r, constant for the gradient; equal rewards (all of them, before the first update) take places in the
    order of the data. Scores belong in [0, 1]: gains are exponential in them.
    """

    name = "lipo"

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        for group in batch.groups:
            check_not_ranks(group, self.name)
        return super().__call__(policy, reference, batch)

    def select(self, group: Group) -> Group:
        """Like the base class, but ranks are refused here, before training."""
        check_not_ranks(group, self.name)
        return super().select(group)

    def group_losses(self, rewards: torch.Tensor, rated: RatedResponses) -> torch.Tensor:
        ahead = rewards.detach().masked_fill(~rated.rated, -torch.inf)
        places = ahead.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
        discounts = 1 / places.to(rewards.dtype).log1p()
        gains = torch.exp2(rated.scores).to(rewards.dtype)
        weights = (_minus(gains) * _minus(discounts)).abs()
        return torch.where(rated.better(), weights * softplus(-_minus(rewards)), 0).sum(dim=(1, 2))


@dataclass(frozen=True, kw_only=True)
class AllPairs(RankingLoss):
    """DPO over all pairs of different scores: the group's mean of ``-(1 - e) log s(r_i - r_j) - e log s(r_j - r_i)``.

    Equation 7 of Rafailov et al. 2023 (arXiv 2305.18290) for each pair with s_i > s_j; the mean over the pairs of a
    ranking is that of Ouyang et al. 2022 (arXiv 2203.02155), equation 1.
    """

    name = "all_pairs"

    weights: str = "equal"
    """Weight of each pair in its group's mean: ``equal``, or ``gap``: in proportion to the difference of scores."""

    label_smoothing: float = 0.0
    """e, the assumed share of pairs whose order is wrong, in [0, 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, ("equal", "gap"), weights=self.weights)
        check_between(self.name, 0, 0.5, ends="[)", label_smoothing=self.label_smoothing)

    def group_losses(self, rewards: torch.Tensor, rated: RatedResponses) -> torch.Tensor:
        margins = _minus(rewards)
        losses = (1 - self.label_smoothing) * softplus(-margins) + self.label_smoothing * softplus(margins)
        better = rated.better().to(rewards.dtype)
        return pair_means(losses, better * _minus(rated.scores).to(rewards.dtype) if self.weights == "gap" else better)


@dataclass(frozen=True, kw_only=True)
class BestVsRest(RankingLoss):
    """The best response against all worse ones: ``log(1 + sum_(s_j < s_i) exp(r_j - r_i))``, i the best.

    Softmax-DPO, the loss of Chen et al. 2024 (arXiv 2406.09215). Several best ones are averaged.
    """

    name = "best_vs_rest"

    form: str = "softmax"
    """``softmax``, or ``pairs``: the mean over j of DPO's ``log(1 + exp(r_j - r_i))``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, ("softmax", "pairs"), form=self.form)

    def group_losses(self, rewards: torch.Tensor, rated: RatedResponses) -> torch.Tensor:
        best = _is_best(rated)
        if self.form == "pairs":
            return pair_means(softplus(-_minus(rewards)), (rated.better() & best[:, :, None]).to(rewards.dtype))
        losses = torch.where(best, _against_worse(rewards, rated), 0)
        return losses.sum(dim=1) / best.sum(dim=1)


def plackett_luce_losses(rewards: torch.Tensor, rated: RatedResponses) -> torch.Tensor:
    """Plackett-Luce negative log-likelihood of each group's ranking, (num_groups,), from (num_groups, N) rewards.

    0 for a group without a preference. See `PlackettLuce` for ties.
    """
    return _against_worse(rewards, rated).sum(dim=1)


def pair_means(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted means of the values of each group's pairs, (num_groups,); 0 where all weights are 0.

    Args:
        values: (num_groups, N, N).
        weights: (num_groups, N, N), 0 where there is no pair.
    """
    totals = weights.sum(dim=(1, 2))
    return (values * weights).sum(dim=(1, 2)) / totals.where(totals > 0, 1)


def mean_over(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of the (num_groups,) values of the groups that count; 0, with a graph, if none does."""
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)


def preference_metrics(rewards: torch.Tensor, rated: RatedResponses) -> dict[str, torch.Tensor]:
    """For each group, (num_groups,): mean reward of the best (``chosen``) and of the others (``rejected``), their
    difference (``margins``), and the share of pairs with different scores that the rewards order correctly
    (``accuracies``).

    Args:
        rewards: (num_groups, N) without gradient.
        rated: The scores.
    """
    best = _is_best(rated)
    others = rated.rated & ~best
    chosen = torch.where(best, rewards, 0).sum(dim=1) / best.sum(dim=1)
    rejected = torch.where(others, rewards, 0).sum(dim=1) / others.sum(dim=1).clamp(min=1)
    right = (_minus(rewards) > 0).to(rewards.dtype)
    accuracies = pair_means(right, rated.better().to(rewards.dtype))
    return {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected, "accuracies": accuracies}


def _against_worse(rewards: torch.Tensor, rated: RatedResponses) -> torch.Tensor:
    """(num_groups, N) negative log-prob of drawing response i from itself and all worse ones; 0 if none is worse."""
    itself = torch.eye(rewards.shape[1], dtype=torch.bool, device=rewards.device)
    drawn_from = rated.better() | itself
    return (-_minus(rewards)).masked_fill(~drawn_from, -torch.inf).logsumexp(dim=2)


def _is_best(rated: RatedResponses) -> torch.Tensor:
    """(num_groups, N) bool: whether the response is rated and none of its group is better."""
    return rated.rated & ~rated.better().any(dim=1)


def _minus(values: torch.Tensor) -> torch.Tensor:
    """(num_groups, N, N): value i minus value j."""
    return values[:, :, None] - values[:, None, :]
