"""Losses on pairs that read the log-ratio of each response by itself.

``r = beta (log pi(y) - log ref(y))`` is the implicit reward of a response, s the logistic function. The term
``beta log Z`` of other f-divergences does not cancel in them, so they have no setting `divergence`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from kvpref.losses.pairs.base import PairLogps, PairLoss


@dataclass(frozen=True, kw_only=True)
class NCA(PairLoss):
    """Noise contrastive alignment: ``-log s(r_c) - log s(-r_c) / 2 - log s(-r_r) / 2``; c is chosen, r rejected.

    Section 4.1 of Chen et al. 2024 (arXiv 2402.05369), for pairs.
    """

    name = "nca"

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        chosen, rejected = self.beta * pairs.chosen_ratios, self.beta * pairs.rejected_ratios
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@dataclass(frozen=True, kw_only=True)
class BCO(PairLoss):
    """Binary classifier optimisation: ``-log s(r_c) - log s(-r_r)``; c is chosen, r rejected.

    Section 4 of Jung et al. 2024 (arXiv 2404.04656), without its shift of the rewards by their running mean, as TRL has
    it for pairs.
    """

    name = "bco"

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        return -logsigmoid(self.beta * pairs.chosen_ratios) - logsigmoid(-self.beta * pairs.rejected_ratios)


@dataclass(frozen=True, kw_only=True)
class SPPO(PairLoss):
    """Self-play preference optimisation: ``(a_c - 1 / (2 beta))^2 + (a_r + 1 / (2 beta))^2``, ``a = r / beta``.

    Equation 4.7 of Wu et al. 2024 (arXiv 2405.00675), where the chosen response wins with probability 1; beta is the
    paper's 1 / eta.
    """

    name = "sppo"

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        target = 0.5 / self.beta
        return (pairs.chosen_ratios - target).square() + (pairs.rejected_ratios + target).square()


@dataclass(frozen=True, kw_only=True)
class APOZero(PairLoss):
    """Anchored preference optimisation that raises the chosen response: ``1 - s(r_c) + s(r_r)``.

    For chosen responses that are better than the model's own. Equation 7 of D'Oosterlinck et al. 2024 (arXiv
    2408.06266).
    """

    name = "apo_zero"

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        return (-self.beta * pairs.chosen_ratios).sigmoid() + (self.beta * pairs.rejected_ratios).sigmoid()


@dataclass(frozen=True, kw_only=True)
class APODown(PairLoss):
    """Anchored preference optimisation that lowers both responses: ``s(r_c) + 1 - s(r_c - r_r)``.

    For chosen responses that are worse than the model's own. Equation 8 of D'Oosterlinck et al. 2024 (arXiv
    2408.06266).
    """

    name = "apo_down"

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        margins = self.beta * (pairs.chosen_ratios - pairs.rejected_ratios)
        return (self.beta * pairs.chosen_ratios).sigmoid() + (-margins).sigmoid()
