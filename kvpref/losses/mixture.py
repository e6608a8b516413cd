"""Weighted sums of losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, ClassVar

from kvpref.errors import InputError
from kvpref.losses.checks import check_not_negative
from kvpref.losses.interface import Groups, Idle, LossOutput, PreferenceLoss
from kvpref.losses.learning_rates import LearningRates, lowest
from kvpref.losses.registry import OBJECTIVES
from kvpref.losses.user import construct_loss, find_loss
from kvpref.plan.batch import Batch
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps
from kvpref.records.requests import HeadOptions

_DEFAULTS: dict[str, dict[str, Any]] = {"sft": {"average": "response"}}
"""Settings of parts in a mixture, unless given: a mean over tokens cannot be added to one over groups."""


@dataclass(frozen=True, kw_only=True)
class WeightedSum(PreferenceLoss):
    """Base: ``sum_i w_i loss_i``, each loss a mean over the same units. Subclasses say what is summed.

    A group that a part leaves out, such as one without a preference, counts 0 in that part's mean. Metrics are those of
    all parts (the first one's where several share a name), and each part's unweighted loss as ``loss/<name>``.
    """

    name: ClassVar[str]

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of the parts, by the part's name."""

    def part_weights(self) -> Mapping[str, float]:
        """The weight of each part, by its registered name."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        weights = self.part_weights()
        if not isinstance(weights, Mapping) or not isinstance(self.settings, Mapping):
            raise InputError(f"{self.name}: weights and settings must be mappings by loss; got {weights!r:.60}")
        check_not_negative(self.name, **{f"weights[{part!r}]": weight for part, weight in weights.items()})
        if not any(weights.values()):
            raise InputError(f"{self.name}: no loss has a weight above 0; give some, such as dpo 1.0 and sft 0.5")
        for part in self.settings:
            if part not in weights:
                raise InputError(f"{self.name}: settings for {part!r}, which is not one of: {', '.join(weights)}")
        for attribute, what in (("unit", "a mean over"), ("reads", "a function of")):
            self._check_alike(attribute, what)
        for part, loss in self.parts.items():
            if len(self.parts) > 1 and type(loss).prepare is not PreferenceLoss.prepare:
                raise InputError(f"{self.name}: {part!r} adds responses that the others must not read; use it alone")
        _ = self.head  # raises if the parts want different things

    def _check_alike(self, attribute: str, what: str) -> None:
        (first, value), *others = [(part, getattr(loss, attribute)) for part, loss in self.parts.items()]
        for part, other in others:
            if other != value:
                raise InputError(
                    f"{self.name}: {first!r} is {what} {value} and {part!r} {what} {other}, so they cannot be mixed"
                )

    @cached_property
    def parts(self) -> dict[str, PreferenceLoss]:
        """The losses whose weight is above 0, by name."""
        return {
            part: construct_loss(
                part,
                OBJECTIVES[part] if part in OBJECTIVES else find_loss(part, OBJECTIVES),
                {**_DEFAULTS.get(part, {}), **self.settings.get(part, {})},
            )
            for part, weight in self.part_weights().items()
            if weight > 0
        }

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return any(part.needs_reference for part in self.parts.values())

    @property
    def reads(self) -> str:  # type: ignore[override]
        return next(iter(self.parts.values())).reads

    @property
    def unit(self) -> str:  # type: ignore[override]
        return next(iter(self.parts.values())).unit

    @property
    def learning_rates(self) -> LearningRates:  # type: ignore[override]
        return lowest((name, part.learning_rates) for name, part in self.parts.items())

    @property
    def couples_groups(self) -> bool:  # type: ignore[override]
        return any(part.couples_groups for part in self.parts.values())

    @property
    def reads_pairs(self) -> bool:  # type: ignore[override]
        return any(part.reads_pairs for part in self.parts.values())

    @property
    def head(self) -> HeadOptions:
        return reduce(HeadOptions.joined, [part.head for part in self.parts.values()])

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for part in self.parts.values() for column in part.columns))

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        weights, num_units = self.part_weights(), self.num_units(batch) or 1
        outputs = {
            name: part(policy, reference if part.needs_reference else None, batch) for name, part in self.parts.items()
        }
        terms = [
            weights[name] * self.parts[name].num_units(batch) / num_units * output.loss
            for name, output in outputs.items()
        ]
        metrics = {f"loss/{name}": output.loss.detach() for name, output in outputs.items()}
        for output in outputs.values():
            metrics = {**output.metrics, **metrics}
        return LossOutput(loss=sum(terms[1:], start=terms[0]), metrics=metrics)

    def num_units(self, batch: Batch) -> float:
        """Groups, or whatever else the parts count.

        Raises:
            InputError: If the parts are not means over groups and count their units differently.
        """
        if self.unit == "groups":
            return batch.num_groups
        counts = {name: part.num_units(batch) for name, part in self.parts.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} for {name!r}" for name, count in counts.items())
            raise InputError(f"{self.name}: the losses count different {self.unit} ({found}), so they cannot be mixed")
        return next(iter(counts.values()))

    def idle(self, group: Group) -> Idle | None:
        """Why no part can learn from the group."""
        found = [part.idle(group) for part in self.parts.values()]
        return None if None in found else found[0]

    def caution(self, group: Group) -> str | None:
        """The first of the parts' cautions."""
        return next(filter(None, (part.caution(group) for part in self.parts.values())), None)

    def select(self, group: Group) -> Group:
        """What all parts agree on; the whole group if one reads what another leaves out."""
        first, *others = [part.select(group) for part in self.parts.values()]
        return first if all(other == first for other in others) else group

    def prepare(self, groups: Groups) -> Iterable[Group]:
        parts = list(self.parts.values())
        return parts[0].prepare(groups) if len(parts) == 1 else super().prepare(groups)

    def prepare_batch(self, batch: Batch) -> None:
        for part in self.parts.values():
            part.prepare_batch(batch)


@dataclass(frozen=True, kw_only=True)
class Mixture(WeightedSum):
    """A weighted sum of losses: ``sum_i w_i loss_i``."""

    name = "mixture"

    weights: Mapping[str, float]
    """Weight of each loss, by its registered name (or ``file.py:function``), such as ``{"dpo": 1.0, "sft": 0.5}``."""

    def part_weights(self) -> Mapping[str, float]:
        return self.weights


@dataclass(frozen=True, kw_only=True)
class MPO(WeightedSum):
    """Mixed preference optimisation: ``w_p dpo + w_q bco + w_g sft``, the likelihood averaged per response.

    Equations 1 to 4 of Wang et al. 2024 (arXiv 2411.10442).
    """

    name = "mpo"

    preference_weight: float = 0.8
    """Weight of DPO."""

    quality_weight: float = 0.2
    """Weight of binary classifier optimisation."""

    generation_weight: float = 1.0
    """Weight of the chosen response's likelihood."""

    def part_weights(self) -> Mapping[str, float]:
        return {"dpo": self.preference_weight, "bco": self.quality_weight, "sft": self.generation_weight}


@dataclass(frozen=True, kw_only=True)
class RPO(WeightedSum):
    """DPO with the likelihood of the chosen response: ``dpo - alpha log pi(chosen) / |chosen|``.

    Equation 1 of Pang et al. 2024 (iterative reasoning preference optimisation, arXiv 2404.19733); the likelihood as a
    regulariser is also that of Liu et al. 2024 (arXiv 2405.16436).
    """

    name = "rpo"

    alpha: float = 1.0
    """Weight of the likelihood per token."""

    def part_weights(self) -> Mapping[str, float]:
        return {"dpo": 1.0, "sft": self.alpha}
