"""Direct preference optimisation on pairs: logistic losses of the margin. s is the logistic function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from kvpref.losses.checks import check_between
from kvpref.losses.pairs.base import MarginLoss, PairLogps


def smoothed_logistic(margins: torch.Tensor, smoothing: float) -> torch.Tensor:
    """``-(1 - e) log s(m) - e log s(-m)`` of each margin m, e the label smoothing."""
    return -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)


@dataclass(frozen=True, kw_only=True)
class DPO(MarginLoss):
    """Sigmoid DPO: ``-(1 - e) log s(beta d) - e log s(-beta d)``, e the label smoothing.

    ``d = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))``. Equation 7 of Rafailov et al.
    2023 (arXiv 2305.18290); the label smoothing is the conservative DPO of Mitchell 2023.
    """

    name = "dpo"

    label_smoothing: float = 0.0
    """Assumed share of pairs whose labels are swapped, in [0, 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self.name, 0, 0.5, ends="[)", label_smoothing=self.label_smoothing)

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        return smoothed_logistic(self.beta * self.margins(pairs), self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class RobustDPO(MarginLoss):
    """DPO that is unbiased under swapped labels: ``(-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)``.

    e is the label smoothing, d the margin of `DPO`. Section 3.1 of Chowdhury et al. 2024 (arXiv 2403.00409).
    """

    name = "robust"

    label_smoothing: float = 0.1
    """Share of pairs whose labels are swapped, in [0, 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self.name, 0, 0.5, ends="[)", label_smoothing=self.label_smoothing)

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        margins = self.beta * self.margins(pairs)
        kept = -(1 - self.label_smoothing) * logsigmoid(margins)
        return (kept + self.label_smoothing * logsigmoid(-margins)) / (1 - 2 * self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class SigmoidNorm(MarginLoss):
    """Length-normalised DPO: ``-log s(beta d)``, d the margin of log-ratios averaged over each response's tokens.

    Section 5 of Lambert et al. 2024 (Tulu 3, arXiv 2411.15124).
    """

    name = "sigmoid_norm"
    per_token = True

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        return -logsigmoid(self.beta * self.margins(pairs))
