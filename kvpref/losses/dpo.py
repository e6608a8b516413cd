"""Direct preference optimisation on pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from kvpref.batch import Batch
from kvpref.errors import InputError
from kvpref.losses.interface import LossOutput, PreferenceLoss
from kvpref.losses.pairs import pair_indices
from kvpref.outputs import ResponseLogps


@dataclass(frozen=True, kw_only=True)
class DPO(PreferenceLoss):
    """Sigmoid DPO: ``-(1 - e) log s(beta d) - e log s(-beta d)``, e the label smoothing and s the logistic function.

    ``d = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))``. Equation 7 of Rafailov et al.
    2023 (arXiv 2305.18290); the label smoothing is the conservative DPO of Mitchell 2023.
    """

    beta: float = 0.1
    """Strength of the pull towards the reference; the larger, the closer."""

    label_smoothing: float = 0.0
    """Assumed share of pairs whose labels are swapped, in [0, 0.5)."""

    needs_reference = True

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise InputError(f"dpo: beta must be positive; got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"dpo: label_smoothing must be in [0, 0.5); got {self.label_smoothing}")

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        if reference is None:
            raise InputError("dpo needs reference log-probs; pass `reference`, or train with PreferenceTrainer")
        chosen, rejected = pair_indices(batch)
        policy_sums = policy.sum()
        rewards = self.beta * (policy_sums - reference.sum())
        margins = rewards[chosen] - rewards[rejected]
        losses = -(1 - self.label_smoothing) * logsigmoid(margins) - self.label_smoothing * logsigmoid(-margins)
        with torch.no_grad():
            metrics = {
                "rewards/chosen": rewards[chosen].mean(),
                "rewards/rejected": rewards[rejected].mean(),
                "rewards/margins": margins.mean(),
                "rewards/accuracies": (margins > 0).to(margins.dtype).mean(),
                "logps/chosen": policy_sums[chosen].mean(),
                "logps/rejected": policy_sums[rejected].mean(),
            }
        return LossOutput(loss=losses.mean(), metrics=metrics)
