"""Alignment via optimal transport: the distribution of chosen responses above that of rejected ones.

Melnyk et al. 2024 (arXiv 2406.05882), section 3: the one-dimensional transport between two samples matches them in
sorted order. The sorting couples all pairs of a micro-batch: how groups are cut into micro-batches changes the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpref.errors import InputError
from kvpref.losses.checks import check_between
from kvpref.losses.pairs.base import PairLogps, PairLoss
from kvpref.losses.pairs.dpo import smoothed_logistic


@dataclass(frozen=True, kw_only=True)
class AOT(PairLoss):
    """AOT for paired data: the logistic loss of ``beta (sort(u) - sort(v))``.

    u is ``log pi(chosen) - log pi(rejected)`` of each pair, v the same of the reference; both are sorted over the
    micro-batch, which couples its pairs. Melnyk et al. 2024 (arXiv 2406.05882), section 3.
    """

    name = "aot"
    couples_groups = True

    label_smoothing: float = 0.0
    """Assumed share of swapped labels, in [0, 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self.name, 0, 0.5, ends="[)", label_smoothing=self.label_smoothing)
        if self.weighting:
            raise InputError(f"{self.name}: weighting weighs pairs, which sorting takes apart; leave it off")

    def pair_losses(self, pairs: PairLogps) -> torch.Tensor:
        policy, reference = self.samples(pairs)
        return smoothed_logistic(self.beta * (policy.sort().values - reference.sort().values), self.label_smoothing)

    def samples(self, pairs: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """The sample that should lie above, and the one below; each (num_groups,)."""
        return pairs.chosen - pairs.rejected, pairs.chosen_reference - pairs.rejected_reference


@dataclass(frozen=True, kw_only=True)
class AOTUnpaired(AOT):
    """AOT for unpaired data: the logistic loss of ``beta (sort(a) - sort(b))``.

    a is the log-ratio to the reference of each chosen response, b that of each rejected one; both are sorted over the
    micro-batch, which couples its pairs. Melnyk et al. 2024 (arXiv 2406.05882), section 3.
    """

    name = "aot_unpaired"

    def samples(self, pairs: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        return pairs.chosen_ratios, pairs.rejected_ratios
