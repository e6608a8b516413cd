"""The results of a demonstration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kvpref.demo.comparison import Comparison
from kvpref.demo.config import DemoConfig
from kvpref.demo.evaluation import Evaluation


class LossPoint(NamedTuple):
    """Training loss, mean over the steps since the point before."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """All results of a demonstration."""

    config: DemoConfig
    """The settings it ran with."""

    evaluations: dict[str, Evaluation]
    """Evaluations on held-out questions, by stage: `start`, `sft`, `dpo`."""

    loss_curves: dict[str, list[LossPoint]]
    """Training losses of the stages `sft` and `dpo`."""

    seconds: dict[str, float]
    """Time of the parts `sft`, `dpo` and `comparison`, and of everything: `total`."""

    comparison: Comparison
    """The modes on the same batches."""

    @property
    def reward_margins(self) -> dict[str, float]:
        """Mean `dpo` reward margin by stage: beta times the log-prob margin gained since `sft`, the reference."""
        reference = self.evaluations["sft"].logp_margin
        beta = self.config.beta
        return {stage: beta * (found.logp_margin - reference) for stage, found in self.evaluations.items()}

    @property
    def ratios(self) -> dict[str, dict[str, float]]:
        """Per other mode, how many times the tokens and the time of `two_pass` it takes."""
        return {
            cost.mode: dict(zip(("tokens", "time"), self.comparison.ratios(cost.mode), strict=True))
            for cost in self.comparison.costs
            if cost.mode != "two_pass"
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-compatible values."""
        return {**asdict(self), "reward_margins": self.reward_margins, "ratios": self.ratios}
