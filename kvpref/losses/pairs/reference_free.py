"""Objectives on pairs without a reference. s is the logistic function, m the mean log-prob per token of a response."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid, relu

from kvpref.losses.checks import check_between, check_choice, check_not_negative, check_number, check_positive
from kvpref.losses.interface import LossOutput, PreferenceLoss
from kvpref.losses.learning_rates import CPO_RATES, ORPO_RATES, SIMPO_RATES
from kvpref.losses.pairs.dpo import smoothed_logistic
from kvpref.losses.pairs.preferred import pair_indices, pair_metrics, preferred_of_pair
from kvpref.plan.batch import Batch
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps


@dataclass(frozen=True, kw_only=True)
class ReferenceFreeLoss(PreferenceLoss):
    """Base: a mean over pairs of a function of the policy's log-probs, plus the chosen response's NLL per token."""

    name: ClassVar[str]

    beta: float
    """Scale of the rewards."""

    reads_pairs = True

    def __post_init__(self) -> None:
        check_positive(self.name, beta=self.beta)

    @property
    def nll_weight(self) -> float:
        """Weight of the negative log-likelihood per token of the chosen responses."""
        return 0.0

    def rewards(self, policy: ResponseLogps) -> torch.Tensor:
        """The reward of each response, (num_sequences,)."""
        return self.beta * policy.mean()

    def pair_losses(self, policy: ResponseLogps, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """The loss of each pair, (num_groups,); `chosen` and `rejected` (num_groups,) are indices of sequences."""
        raise NotImplementedError

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        chosen, rejected = pair_indices(batch)
        loss = self.pair_losses(policy, chosen, rejected).mean()
        with torch.no_grad():
            rewards, sums = self.rewards(policy), policy.sum()
            metrics = pair_metrics(rewards[chosen], rewards[rejected], sums[chosen], sums[rejected])
        if self.nll_weight:
            nll = -policy.mean()[chosen].mean()
            loss = loss + self.nll_weight * nll
            metrics["nll_per_token"] = nll.detach()
        return LossOutput(loss=loss, metrics=metrics)

    def select(self, group: Group) -> Group:
        """The pair; a group that is not a pair is refused here, before training."""
        preferred_of_pair(group)
        return group

    def prepare_batch(self, batch: Batch) -> None:
        super().prepare_batch(batch)
        pair_indices(batch)


@dataclass(frozen=True, kw_only=True)
class SimPO(ReferenceFreeLoss):
    """Simple preference optimisation: ``-log s(beta m(chosen) - beta m(rejected) - gamma)``.

    Equation 6 of Meng et al. 2024 (arXiv 2405.14734).
    """

    name = "simpo"
    learning_rates = SIMPO_RATES

    beta: float = 2.0
    """Scale of the mean log-probs."""

    gamma: float = 0.5
    """Margin by which the chosen response's reward should win, 0 or more."""

    label_smoothing: float = 0.0
    """Assumed share of pairs whose labels are swapped, in [0, 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self.name, gamma=self.gamma)
        check_between(self.name, 0, 0.5, ends="[)", label_smoothing=self.label_smoothing)

    def pair_losses(self, policy: ResponseLogps, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        rewards = self.rewards(policy)
        return smoothed_logistic(rewards[chosen] - rewards[rejected] - self.gamma, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class AlphaPO(SimPO):
    """SimPO with another shape of the reward: ``r = beta (1 - exp(-alpha m)) / alpha``.

    Gupta et al. 2025 (arXiv 2501.03884); alpha 0 is SimPO. The defaults are those of its table 3 for Mistral-Instruct.
    """

    name = "alphapo"

    beta: float = 2.5
    """Scale of the rewards."""

    gamma: float = 0.1
    """Margin by which the chosen response's reward should win, 0 or more."""

    alpha: float = 0.25
    """Shape of the reward; above 0 it falls faster than the log-prob, below 0 slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, alpha=self.alpha)

    def rewards(self, policy: ResponseLogps) -> torch.Tensor:
        if self.alpha == 0:
            return super().rewards(policy)
        return -self.beta * torch.expm1(-self.alpha * policy.mean()) / self.alpha


@dataclass(frozen=True, kw_only=True)
class ORPO(ReferenceFreeLoss):
    """Odds ratio preference optimisation: ``-m(chosen) - beta log s(log odds(chosen) - log odds(rejected))``.

    ``log odds = m - log(1 - exp(m))``. Equations 4, 6 and 7 of Hong et al. 2024 (arXiv 2403.07691); beta is lambda.
    The likelihood is that of the response; TRL's runs over the prompt too.
    """

    name = "orpo"
    learning_rates = ORPO_RATES

    beta: float = 0.1
    """Weight of the odds ratio."""

    @property
    def nll_weight(self) -> float:
        return 1.0

    def pair_losses(self, policy: ResponseLogps, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        means = policy.mean()
        log_odds = means - _log1mexp(means)
        return -self.beta * logsigmoid(log_odds[chosen] - log_odds[rejected])


@dataclass(frozen=True, kw_only=True)
class CPO(ReferenceFreeLoss):
    """Contrastive preference optimisation: ``-log s(beta (log pi(chosen) - log pi(rejected))) - cpo_alpha m(chosen)``.

    Equation 3 of Xu et al. 2024 (arXiv 2401.08417); its likelihood is averaged over the tokens of each response here.
    """

    name = "cpo"
    learning_rates = CPO_RATES

    beta: float = 0.1
    """Scale of the log-probs."""

    form: str = "sigmoid"
    """``sigmoid``, or ``hinge``: ``max(0, 1 - beta (log pi(chosen) - log pi(rejected)))``."""

    cpo_alpha: float = 1.0
    """Weight of the likelihood of the chosen response, 0 or more."""

    label_smoothing: float = 0.0
    """Assumed share of pairs whose labels are swapped, in [0, 0.5); for the form ``sigmoid``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, ("sigmoid", "hinge"), form=self.form)
        check_not_negative(self.name, cpo_alpha=self.cpo_alpha)
        check_between(self.name, 0, 0.5, ends="[)", label_smoothing=self.label_smoothing)

    @property
    def nll_weight(self) -> float:
        return self.cpo_alpha

    def rewards(self, policy: ResponseLogps) -> torch.Tensor:
        return self.beta * policy.sum()

    def pair_losses(self, policy: ResponseLogps, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        rewards = self.rewards(policy)
        margins = rewards[chosen] - rewards[rejected]
        return relu(1 - margins) if self.form == "hinge" else smoothed_logistic(margins, self.label_smoothing)


def _log1mexp(values: torch.Tensor) -> torch.Tensor:
    """``log(1 - exp(x))`` for x <= 0, exact at both ends; x is kept below 0, where the result would be -inf.

    Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    values = values.clamp(max=-torch.finfo(values.dtype).eps)
    near = values > -math.log(2)
    # `where` sends a zero gradient into the branch not taken, and zero times infinity is NaN: it gets a harmless value.
    close = torch.log(-torch.expm1(torch.where(near, values, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, values)))
    return torch.where(near, close, far)
