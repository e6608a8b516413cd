"""Objectives on single responses, each desirable or not, at any number per prompt. s is the logistic function."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from kvpref.errors import InputError
from kvpref.losses.checks import check_not_negative, check_number, check_positive
from kvpref.losses.interface import Groups, LossOutput, PreferenceLoss
from kvpref.losses.learning_rates import GOOD_OR_BAD_RATES
from kvpref.losses.mismatched import add_mismatched, mismatched_flags
from kvpref.losses.scores import check_not_ranks, known_scores
from kvpref.plan.batch import Batch
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps


class Places(NamedTuple):
    """Indices of the responses of each kind among a batch's sequences; each (n,) int64.

    Attributes:
        chosen: Desirable ones.
        rejected: Undesirable ones.
        mismatched: Responses of other groups.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    mismatched: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class UnpairedLoss(PreferenceLoss):
    """Base: a mean over responses of ``1 - s(beta (r - z))`` for desirable and ``1 - s(beta (z - r))`` for other ones.

    ``r = log pi(y) - log ref(y)``; subclasses say what z is. The labels of a group say which responses are desirable;
    without labels its scores do. Metrics of one kind are left out of a micro-batch that has none of it.
    """

    name: ClassVar[str]

    beta: float = 0.1
    """Strength of the pull towards the reference; the larger, the closer."""

    desirable_weight: float = 1.0
    """Weight of a desirable response; raise it if these are the minority."""

    undesirable_weight: float = 1.0
    """Weight of an undesirable response."""

    score_threshold: float = 0.5
    """In groups without labels, responses with a higher score are desirable."""

    needs_reference = True
    learning_rates = GOOD_OR_BAD_RATES
    unit = "sequences"

    def __post_init__(self) -> None:
        check_positive(self.name, beta=self.beta)
        check_not_negative(
            self.name, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight
        )
        check_number(self.name, score_threshold=self.score_threshold)

    def reference_point(self, ratios: torch.Tensor, mismatched: torch.Tensor) -> torch.Tensor:
        """z, () without gradient.

        Args:
            ratios: (num_sequences,) log-ratio of each response to the reference.
            mismatched: (n,) int64, indices of the responses of other groups.
        """
        raise NotImplementedError

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        if reference is None:
            raise InputError(
                f"{self.name} needs reference log-probs; pass `reference`, or train with PreferenceTrainer"
            )
        places = batch.tensors(_places, self)
        sums = policy.sum()
        ratios = sums - reference.sum()
        point = self.reference_point(ratios.detach(), places.mismatched)
        good, bad = ratios[places.chosen] - point, ratios[places.rejected] - point
        losses = torch.cat(
            [
                self.desirable_weight * (-self.beta * good).sigmoid(),
                self.undesirable_weight * (self.beta * bad).sigmoid(),
            ]
        )
        metrics = self._metrics(ratios.detach(), sums.detach(), places)
        return LossOutput(loss=losses.mean(), metrics={"kl": point, **metrics})

    def group_units(self, group: Group) -> int:
        """Responses, without the mismatched ones."""
        return sum(not flag for flag in mismatched_flags(group))

    def select(self, group: Group) -> Group:
        """The whole group; one that does not say which responses are desirable is refused here, before training."""
        self._desirable(group)
        return group

    def prepare_batch(self, batch: Batch) -> None:
        super().prepare_batch(batch)
        batch.tensors(_places, self)

    def _desirable(self, group: Group) -> list[bool]:
        """One flag per sequence, False for mismatched ones."""
        flags = mismatched_flags(group)
        if group.labels is not None:
            return [label and not flag for label, flag in zip(group.labels, flags, strict=True)]
        check_not_ranks(group, self.name)
        scores = known_scores(group) or (None,) * len(group)
        for index, (score, flag) in enumerate(zip(scores, flags, strict=True)):
            if score is None and not flag:
                raise InputError(
                    f"{group.id}: response {index} has neither a label nor a score; {self.name} needs one for each"
                )
        return [score is not None and score > self.score_threshold for score in scores]

    def _metrics(self, ratios: torch.Tensor, sums: torch.Tensor, places: Places) -> dict[str, torch.Tensor]:
        metrics: dict[str, torch.Tensor] = {}
        for kind, members in (("chosen", places.chosen), ("rejected", places.rejected)):
            if members.numel():
                metrics[f"rewards/{kind}"] = self.beta * ratios[members].mean()
                metrics[f"logps/{kind}"] = sums[members].mean()
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics


@dataclass(frozen=True, kw_only=True)
class KTO(UnpairedLoss):
    """Kahneman-Tversky optimisation: ``1 - s(beta (r - z))`` if desirable, ``1 - s(beta (z - r))`` if not.

    r is the log-ratio of the response to the reference, z an estimate of the KL divergence of policy and reference:
    ``z = max(0, mean of log pi(y') - log ref(y'))`` without gradient, over the mismatched responses y' of the
    micro-batch: prompts answered with the responses of other groups. It couples the groups of a micro-batch: how they
    are cut into micro-batches changes the estimate. Equations 7 and 8 of Ethayarajh et al. 2024 (arXiv 2402.01306).
    """

    name = "kto"
    couples_groups = True

    num_mismatched: int = 1
    """Mismatched responses to make for each group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.num_mismatched
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"{self.name}: num_mismatched must be an integer of at least 1; got {count!r}")

    def prepare(self, groups: Groups) -> Iterable[Group]:
        """Each group with mismatched responses; see `add_mismatched`."""
        for group in groups:
            self.select(group)
        return add_mismatched(groups, self.num_mismatched)

    def reference_point(self, ratios: torch.Tensor, mismatched: torch.Tensor) -> torch.Tensor:
        if not mismatched.numel():
            raise InputError(f"{self.name} needs mismatched responses; pass the groups through `loss.prepare` first")
        return ratios[mismatched].mean().clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class APOZeroUnpaired(UnpairedLoss):
    """APO-zero of single responses: ``1 - s(beta r)`` if desirable, ``s(beta r)`` if not.

    r is the log-ratio of the response to the reference; it is `KTO` with z = 0.
    Equation 7 of D'Oosterlinck et al. 2024 (arXiv 2408.06266), its two terms by themselves.
    """

    name = "apo_zero_unpaired"

    def reference_point(self, ratios: torch.Tensor, mismatched: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), dtype=ratios.dtype, device=ratios.device)


def _places(groups: Sequence[Group], loss: UnpairedLoss) -> Places:
    mismatched = [flag for group in groups for flag in mismatched_flags(group)]
    desirable = [flag for group in groups for flag in loss._desirable(group)]
    others = [not (flag or good) for flag, good in zip(mismatched, desirable, strict=True)]
    return Places(_indices(desirable), _indices(others), _indices(mismatched))


def _indices(flags: list[bool]) -> torch.Tensor:
    """Where the flags are set, (n,) int64."""
    return torch.tensor([index for index, flag in enumerate(flags) if flag], dtype=torch.int64)
