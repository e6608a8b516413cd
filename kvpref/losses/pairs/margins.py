"""Losses of the margin d of a pair that are not logistic; d as in `DPO`, s is the logistic function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid, relu

from kvpref.losses.checks import check_between, check_positive
from kvpref.losses.pairs.base import MarginLoss, PairLogps


@dataclass(frozen=True, kw_only=True)
class Hinge(MarginLoss):
    """Hinge: ``max(0, 1 - beta d)``.

    Section 2 of Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425), with the log-ratios of Liu et al. 2023 (RSO, arXiv
    2309.06657).
    """

    name = "hinge"

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        return relu(1 - self.beta * self.margins(pairs))


@dataclass(frozen=True, kw_only=True)
class IPO(MarginLoss):
    """Identity preference optimisation: ``(d - 1 / (2 beta))^2``, d of log-ratios averaged over each response's tokens.

    Equation 17 of Azar et al. 2023 (arXiv 2310.12036), whose tau is beta. The average over tokens is not in the paper's
    text; TRL reports it from its authors.
    """

    name = "ipo"
    per_token = True

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        return (self.margins(pairs) - 1 / (2 * self.beta)).square()


@dataclass(frozen=True, kw_only=True)
class EXO(MarginLoss):
    """Exact optimisation: the KL divergence from ``(s(beta d), s(-beta d))`` to ``(1 - e, e)``, e the label smoothing.

    Equation 16 of Ji et al. 2024 (arXiv 2402.00856).
    """

    name = "exo"

    label_smoothing: float = 1e-3
    """Probability that the rejected response is the better one, in (0, 0.5); at 0 the divergence is infinite."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self.name, 0, 0.5, ends="()", label_smoothing=self.label_smoothing)

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        margins = self.beta * self.margins(pairs)
        won = margins.sigmoid() * (logsigmoid(margins) - math.log1p(-self.label_smoothing))
        lost = (-margins).sigmoid() * (logsigmoid(-margins) - math.log(self.label_smoothing))
        return won + lost


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(MarginLoss):
    """Log-ratio modulated loss: ``-(1 - w) log s(beta d) + w exp(-beta d)``, ``w = s(beta d / tau)``.

    Equation 5 of Lu et al. 2024 (arXiv 2406.08414).
    """

    name = "discopop"

    tau: float = 0.05
    """Temperature of the blend between the logistic and the exponential loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, tau=self.tau)

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        margins = self.beta * self.margins(pairs)
        blend = margins / self.tau
        # w exp(-m) as one exponential: for very negative m it would be 0 times infinity.
        exponential = (logsigmoid(blend) - margins).exp()
        return -(-blend).sigmoid() * logsigmoid(margins) + exponential
