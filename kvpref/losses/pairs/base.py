"""The common base of objectives on pairs against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from kvpref.errors import InputError
from kvpref.losses.checks import check_between, check_choice, check_number, check_positive
from kvpref.losses.interface import LossOutput, PreferenceLoss
from kvpref.losses.learning_rates import PREFERENCE_RATES
from kvpref.losses.pairs.f_divergences import DIVERGENCES
from kvpref.losses.pairs.preferred import pair_indices, pair_metrics, preferred_of_pair
from kvpref.plan.batch import Batch
from kvpref.plan.columns import token_weights
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps, or_one
from kvpref.records.requests import HeadOptions


class PairLogps(NamedTuple):
    """Log-probs of the pairs of a batch; all fields (num_groups,).

    Attributes:
        chosen: ``log pi(chosen)``.
        rejected: ``log pi(rejected)``.
        chosen_reference: ``log ref(chosen)``.
        rejected_reference: ``log ref(rejected)``.
        chosen_lengths: Scored tokens of the chosen response, int64, or the sum of their weights; 1 where that is 0.
        rejected_lengths: The same for the rejected response.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_reference: torch.Tensor
    rejected_reference: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor

    @property
    def chosen_ratios(self) -> torch.Tensor:
        """``log pi(chosen) - log ref(chosen)``."""
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratios(self) -> torch.Tensor:
        """``log pi(rejected) - log ref(rejected)``."""
        return self.rejected - self.rejected_reference


@dataclass(frozen=True, kw_only=True)
class PairLoss(PreferenceLoss):
    """Base: a mean over pairs of a function of their log-probs and the reference's. Subclasses write `pair_losses`."""

    name: ClassVar[str]

    beta: float = 0.1
    """Strength of the pull towards the reference; the larger, the closer."""

    ld_alpha: float | None = None
    """Weight, in [0, 1], of tokens beyond the length of the pair's shorter response; None is 1. Lengths are sums of
    weights if tokens have them. LD-DPO, Liu et al. 2024 (arXiv 2409.06411)."""

    weighting: bool = False
    """Weigh each pair by how likely the policy is to produce it: ``exp`` of the mean over tokens of
    ``log pi(token) - log sum_v pi(v)^2``, multiplied over both responses, without gradient. WPO, equation 2 of Zhou et
    al. 2024 (arXiv 2406.11827), with its weight alignment."""

    needs_reference = True
    reads_pairs = True
    learning_rates = PREFERENCE_RATES

    def __post_init__(self) -> None:
        check_positive(self.name, beta=self.beta)
        if self.ld_alpha is not None:
            check_between(self.name, 0, 1, ends="[]", ld_alpha=self.ld_alpha)

    @property
    def head(self) -> HeadOptions:
        return HeadOptions(collision=self.weighting)

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        """The loss of each pair, (num_groups,)."""
        raise NotImplementedError

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        if reference is None:
            raise InputError(
                f"{self.name} needs reference log-probs; pass `reference`, or train with PreferenceTrainer"
            )
        chosen, rejected = pair_indices(batch)
        pairs = self._pair_logps(policy, reference, batch)
        losses = self.pair_losses(pairs)
        if self.weighting:
            weights = self._sequence_weights(policy)
            losses = losses * weights[chosen] * weights[rejected]
        with torch.no_grad():
            rewards = (self.beta * pairs.chosen_ratios, self.beta * pairs.rejected_ratios)
            metrics = pair_metrics(*rewards, pairs.chosen, pairs.rejected)
        return LossOutput(loss=losses.mean(), metrics=metrics)

    def select(self, group: Group) -> Group:
        """The pair; a group that is not a pair is refused here, before training."""
        preferred_of_pair(group)
        return group

    def prepare_batch(self, batch: Batch) -> None:
        super().prepare_batch(batch)
        pair_indices(batch)
        if self.ld_alpha is not None:
            batch.tensors(_weights_before)

    def _pair_logps(self, policy: ResponseLogps, reference: ResponseLogps, batch: Batch) -> PairLogps:
        chosen, rejected = pair_indices(batch)
        lengths = policy.total_weights()
        sums, reference_sums = policy.sum(), reference.sum()
        if self.ld_alpha is not None:
            shorter = lengths.clone()
            shorter[chosen] = shorter[rejected] = torch.minimum(lengths[chosen], lengths[rejected])
            counts = self._token_counts(policy, shorter, batch)
            sums = policy.sum_of(policy.token_logps * counts)
            reference_sums = reference.sum_of(reference.token_logps * counts)
        return PairLogps(
            chosen=sums[chosen],
            rejected=sums[rejected],
            chosen_reference=reference_sums[chosen],
            rejected_reference=reference_sums[rejected],
            chosen_lengths=or_one(lengths[chosen]),
            rejected_lengths=or_one(lengths[rejected]),
        )

    def _token_counts(self, policy: ResponseLogps, num_full: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(S,): 1 for the first `num_full` (num_sequences,) tokens of each sequence, `ld_alpha` for those after.

        A token whose weight spans the boundary counts in part, so that the loss is continuous.
        """
        within = policy.per_token(num_full) - batch.tensors(_weights_before)
        if policy.weights is not None:
            within = within / or_one(policy.weights)
        within = within.clamp(0, 1).to(policy.token_logps.dtype)
        return within + (1 - within) * float(self.ld_alpha or 0.0)

    def _sequence_weights(self, policy: ResponseLogps) -> torch.Tensor:
        if policy.collision is None:
            raise InputError(f"{self.name}: weighting needs the policy's `collision`; compute log-probs with loss.head")
        return policy.mean_of(policy.token_logps.detach() - policy.collision).exp()


@dataclass(frozen=True, kw_only=True)
class MarginLoss(PairLoss):
    """Base: a function of the margin between the chosen and the rejected response, under any f-divergence."""

    divergence: str = "reverse_kl"
    """Between policy and reference: ``reverse_kl``, ``forward_kl``, ``js`` or ``alpha``. f-DPO, Wang et
    al. 2023 (arXiv 2309.16240)."""

    divergence_alpha: float = 0.5
    """Coefficient of the divergence ``alpha``; 0 is forward KL, 1 reverse KL."""

    per_token: ClassVar[bool] = False
    """Whether the scores are averaged over the tokens of their response."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, DIVERGENCES, divergence=self.divergence)
        check_number(self.name, divergence_alpha=self.divergence_alpha)

    def margins(self, pairs: PairLogps) -> torch.Tensor:
        """(num_groups,): the score of the chosen response minus that of the rejected one, before beta."""
        score = DIVERGENCES[self.divergence]
        chosen = score(pairs.chosen_ratios, self.divergence_alpha)
        rejected = score(pairs.rejected_ratios, self.divergence_alpha)
        if self.per_token:
            return chosen / pairs.chosen_lengths - rejected / pairs.rejected_lengths
        return chosen - rejected


def _weights_before(groups: Sequence[Group]) -> torch.Tensor:
    """Per scored token, the total weight of those before it in its response, (num_scored_tokens,) float64."""
    lengths = [sequence.total_scored for group in groups for sequence in group.sequences]
    own = token_weights(groups).split(lengths)
    return torch.cat([weights.cumsum(0) - weights for weights in own])
