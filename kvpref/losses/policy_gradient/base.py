"""Policy gradients from given rewards: one sum over tokens of advantage, importance ratio, clipping, KL and entropy.

Rewards are the scores of the data. In the docstrings A is a response's advantage, w the importance ratio pi / old, D
the KL estimate of a token, and t runs over the T scored tokens of a response. Where tokens have weights
(`kvpref.Sequence`), sum_t is weighted by them, and T is their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from kvpref.errors import InputError
from kvpref.losses.checks import check_choice, check_not_negative, check_number
from kvpref.losses.interface import Idle, LossOutput, PreferenceLoss
from kvpref.losses.learning_rates import POLICY_GRADIENT_RATES
from kvpref.losses.policy_gradient.advantages import SCALES, group_advantages, score_deviations
from kvpref.losses.policy_gradient.kl_estimators import KL_ESTIMATORS, MAX_LOG_RATIO
from kvpref.losses.policy_gradient.turn_scores import (
    EQUAL_TURN_SCORES,
    scored_by_turn,
    turn_advantages,
    turns_differ,
)
from kvpref.losses.scores import EQUAL_SCORES, TURN_SCORES, has_preference, rated_indices, rated_responses
from kvpref.plan.batch import Batch
from kvpref.plan.columns import exact_token_numbers, spread_numbers
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps, or_one
from kvpref.records.requests import HeadOptions

ZERO_ADVANTAGES = Idle("all advantages are 0", "give responses whose advantages differ from 0")
_IDLE = {"scores": EQUAL_SCORES, TURN_SCORES: EQUAL_TURN_SCORES}


def _token_level(policy: ResponseLogps, log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio


def _mean_level(policy: ResponseLogps, log_ratio: torch.Tensor) -> torch.Tensor:
    return policy.per_token(policy.mean_of(log_ratio))


def _sum_level(policy: ResponseLogps, log_ratio: torch.Tensor) -> torch.Tensor:
    return policy.per_token(policy.sum_of(log_ratio))


RATIO_LEVELS: dict[str, Callable[[ResponseLogps, torch.Tensor], torch.Tensor]] = {
    "token": _token_level,
    "sequence_mean": _mean_level,
    "sequence_sum": _sum_level,
}
"""The log importance ratios, (S,), from tokens' log ratios, (S,): per token, or of the whole response, as the mean or
sum of its log ratios."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(PreferenceLoss):
    """Base of the methods. A response without scored tokens contributes 0; unrated ones are left out."""

    advantages: str = "scores"
    """``scores``: computed in each group from its scores. ``turn_scores``: from the scores of the responses' turns, see
    `kvpref.losses.policy_gradient.turn_scores.turn_advantages`. Else the name of a column with one number per response,
    per turn or per scored token."""

    scale_rewards: str = "group"
    """Advantages from scores are divided by the ``group``'s standard deviation, or by nothing: ``none``."""

    old: str = "policy"
    """The log-probs under which w = 1: those of the ``policy`` now (one update per sample), those of the ``reference``
    (fixed samples, drawn from the model as it was before training), or the name of a column with one number per scored
    token, recorded when the samples were drawn, at this `temperature`."""

    beta: float = 0.0
    """Coefficient of the KL term to the reference; above 0 the reference is needed."""

    kl_estimator: str = "k3"
    """``k1``, ``k2`` or ``k3``; see `kvpref.losses.policy_gradient.kl_estimators.KL_ESTIMATORS`."""

    correct_kl: bool = True
    """Multiply the KL term of a token by w: then k1 and k3 have the gradient of the KL, also for old samples
    (DeepSeek-AI 2025, arXiv 2512.02556; TRL's ``use_bias_correction_kl``). False: as in the equations."""

    temperature: float = 1.0
    """The temperature that the samples were drawn at; logits are divided by it."""

    entropy_coef: float = 0.0
    """Coefficient of a bonus for the entropy per token; 0 leaves it uncomputed."""

    name: ClassVar[str]
    ratio_level: ClassVar[str] = "token"
    baseline: ClassVar[str] = "mean"
    kl_in_rewards: ClassVar[bool] = False
    unit = "sequences"
    learning_rates = POLICY_GRADIENT_RATES

    def __post_init__(self) -> None:
        check_choice(self.name, SCALES, scale_rewards=self.scale_rewards)
        check_choice(self.name, KL_ESTIMATORS, kl_estimator=self.kl_estimator)
        check_not_negative(self.name, beta=self.beta)
        check_number(self.name, entropy_coef=self.entropy_coef)
        HeadOptions(temperature=self.temperature)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.beta > 0 or self.old == "reference"

    @property
    def head(self) -> HeadOptions:
        return HeadOptions(temperature=self.temperature, entropy=self.entropy_coef != 0)

    @property
    def columns(self) -> tuple[str, ...]:
        old = () if self._old_column is None else (self._old_column,)
        return old if self.advantages == "scores" else (*old, self.advantages)

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        if self.needs_reference and reference is None:
            raise InputError(
                f"{self.name} with old={self.old!r} and beta={self.beta} needs reference log-probs; "
                "pass `reference`, or train with PreferenceTrainer"
            )
        old = self._old_logps(policy, reference, batch)
        kl = self._kl(policy, old, reference)
        advantages, metrics = self._advantages(policy, batch, kl)
        log_ratios = RATIO_LEVELS[self.ratio_level](policy, policy.token_logps - old)
        ratios = log_ratios.clamp(max=MAX_LOG_RATIO).exp()
        losses = self.token_losses(policy.token_logps, ratios, advantages)
        metrics |= {"ratio_mean": ratios, **self.clip_metrics(ratios, advantages)}
        if kl is not None:
            kl = kl * ratios if self.correct_kl else kl
            metrics["kl"] = kl
            losses = losses if self.kl_in_rewards else losses + self.beta * kl

        counted = batch.tensors(_counted, self).to(policy.token_logps)
        num_units = self.num_units(batch) or 1
        loss = (losses * policy.weighted(self.token_shares(policy, counted))).sum() / num_units
        shares = policy.weighted(self._mean_shares(policy, counted)) / num_units
        if self.entropy_coef != 0:
            if policy.entropy is None:
                raise InputError(f"{self.name} needs entropies; compute log-probs with head=loss.head")
            metrics["entropy"] = policy.entropy
            loss = loss - self.entropy_coef * (policy.entropy * shares).sum()
        return LossOutput(loss=loss, metrics={name: (value.detach() * shares).sum() for name, value in metrics.items()})

    def token_losses(self, logps: torch.Tensor, ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """The loss of each scored token, (S,), without KL and entropy; all arguments are (S,)."""
        raise NotImplementedError

    def clip_metrics(self, ratios: torch.Tensor, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> (S,) 1 where a ratio is clipped, else 0."""
        raise NotImplementedError

    def token_shares(self, policy: ResponseLogps, counted: torch.Tensor) -> torch.Tensor:
        """The factor on each token's loss besides its weight, (S,); the sum is divided by `num_units`."""
        return self._mean_shares(policy, counted)

    def group_units(self, group: Group) -> float:
        """Responses that count, or their scored tokens (the sum of their weights)."""
        counted = [group.sequences[index] for index in self.counted_indices(group)]
        return sum(sequence.total_weight for sequence in counted) if self.unit == "tokens" else len(counted)

    def idle(self, group: Group) -> Idle | None:
        """The reason if all advantages are 0, which leaves only the KL term and the entropy to learn from."""
        found = None if self.has_advantages(group) else _IDLE.get(self.advantages, ZERO_ADVANTAGES)
        # Without a unit (dynamic sampling) the other terms do not count either.
        return found if self.group_units(group) == 0 or (self.beta == 0 and self.entropy_coef == 0) else None

    def select(self, group: Group) -> Group:
        """The responses that count; a single one if none does."""
        return group.take(self.counted_indices(group) or [0])

    def prepare_batch(self, batch: Batch) -> None:
        batch.tensors(_counted, self)
        if self._old_column is not None:
            batch.tensors(exact_token_numbers, self._old_column)
        if self.advantages == "scores":
            rated_responses(batch)
        elif self.advantages == TURN_SCORES:
            batch.tensors(turn_advantages, self.scale_rewards)
        else:
            batch.tensors(spread_numbers, self.advantages)

    def counted_indices(self, group: Group) -> list[int]:
        """The responses of a group that the mean runs over."""
        if self.advantages == TURN_SCORES:
            return scored_by_turn(group)
        return rated_indices(group) if self.advantages == "scores" else list(range(len(group)))

    def has_advantages(self, group: Group) -> bool:
        """Whether any token has a nonzero advantage."""
        if self.advantages == TURN_SCORES:
            return turns_differ(group)
        return has_preference(group) if self.advantages == "scores" else _any(group.columns.get(self.advantages))

    @property
    def _old_column(self) -> str | None:
        return None if self.old in ("policy", "reference") else self.old

    def _old_logps(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> torch.Tensor:
        if self.old == "policy":
            return policy.token_logps.detach()
        if self.old == "reference":
            assert reference is not None
            return reference.token_logps
        return batch.tensors(exact_token_numbers, self.old).to(policy.token_logps)

    def _kl(self, policy: ResponseLogps, old: torch.Tensor, reference: ResponseLogps | None) -> torch.Tensor | None:
        """(S,) KL estimates; as a part of the rewards, that of the model that drew the samples, without gradient."""
        if self.beta == 0 or reference is None:
            return None
        drawn_from = old if self.kl_in_rewards else policy.token_logps
        return KL_ESTIMATORS[self.kl_estimator](drawn_from - reference.token_logps)

    def _advantages(
        self, policy: ResponseLogps, batch: Batch, kl: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The advantages, (S,), and metrics of them, (S,) each."""
        logps = policy.token_logps
        if self.advantages == TURN_SCORES:
            found = batch.tensors(turn_advantages, self.scale_rewards)
            names = ("reward", "reward_std", "frac_reward_zero_std")
            metrics = {name: policy.per_token(value.to(logps)) for name, value in zip(names, found[1:], strict=True)}
            return found.advantages.to(logps), {"advantage": found.advantages.to(logps), **metrics}
        if self.advantages != "scores":
            given = batch.tensors(spread_numbers, self.advantages).to(logps)
            return given, {"advantage": given}
        rated = rated_responses(batch)
        rewarded = rated
        if self.kl_in_rewards and kl is not None:
            penalties = rated.of(self.beta * policy.sum_of(kl)).to(rated.scores.dtype)
            rewarded = rated._replace(scores=(rated.scores - penalties).where(rated.rated, 0))
        deviations = score_deviations(rated)[:, None].expand_as(rated.scores)
        values = {
            "advantage": group_advantages(rewarded, baseline=self.baseline, scale=self.scale_rewards),
            "reward": rated.scores,
            "reward_std": deviations,
            "frac_reward_zero_std": (~rated.better().any(dim=(1, 2)))[:, None].expand_as(rated.scores),
        }
        metrics = {name: policy.per_token(rated.to_sequences(value).to(logps)) for name, value in values.items()}
        return metrics["advantage"], metrics

    def _mean_shares(self, policy: ResponseLogps, counted: torch.Tensor) -> torch.Tensor:
        """Shares that make the sum over tokens, divided by `num_units`, a mean over units."""
        return policy.per_token(counted if self.unit == "tokens" else counted / or_one(policy.total_weights()))


def _any(values: Any) -> bool:
    """Whether a number, or any number in nested lists, is not 0."""
    return any(map(_any, values)) if isinstance(values, list | tuple | np.ndarray) else bool(values)


def _counted(groups: Sequence[Group], loss: PolicyGradient) -> torch.Tensor:
    """(num_sequences,) float32, 1 where a response counts, else 0."""
    counted = [set(loss.counted_indices(group)) for group in groups]
    flags = [index in own for group, own in zip(groups, counted, strict=True) for index in range(len(group))]
    return torch.tensor(flags, dtype=torch.float32)
