"""The learning rates that each kind of objective is commonly trained with, and their sources."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Peak learning rates of Adam for one kind of objective: the trainer's defaults."""

    full: float
    """For a model that is trained in full."""

    adapter: float
    """For a model with only an adapter (LoRA) trained."""

    source: str
    """Where they come from, for people who choose one."""

    def rate(self, *, adapter_only: bool) -> float:
        """The rate that applies."""
        return self.adapter if adapter_only else self.full


_TEN_TIMES = "ten times as high with an adapter: Schulman et al. 2025, LoRA Without Regret"

PREFERENCE_RATES = LearningRates(
    full=5e-7,
    adapter=5e-6,
    source="the DPO recipes of Zephyr 7B beta in alignment-handbook (config_full.yaml, config_qlora.yaml), and TRL's "
    "scripts/dpo.py",
)
"""Pairs, rankings and single responses, with or without a reference."""

GOOD_OR_BAD_RATES = LearningRates(full=5e-7, adapter=5e-6, source="TRL's scripts/kto.py; the adapter's as for dpo")
"""Single responses, each desirable or not."""

SIMPO_RATES = LearningRates(
    full=5e-7,
    adapter=5e-6,
    source="between the 3e-7 and 1e-6 of the recipes in princeton-nlp/SimPO; the adapter's as for dpo",
)

CPO_RATES = LearningRates(full=1e-6, adapter=5e-6, source="the default of TRL's CPOConfig; the adapter's as for dpo")

ORPO_RATES = LearningRates(
    full=5e-6,
    adapter=5e-5,
    source=f"the ORPO recipe of Zephyr 141B in alignment-handbook; {_TEN_TIMES}",
)

LIKELIHOOD_RATES = LearningRates(
    full=2e-5,
    adapter=2e-4,
    source="the SFT recipes of Zephyr 7B beta in alignment-handbook (config_full.yaml, config_qlora.yaml), and TRL's "
    "scripts/sft.py",
)

REWARD_RATES = LearningRates(full=1e-5, adapter=1e-4, source="TRL's examples/scripts/reward_modeling.py")
"""Reward models, whose scalar head starts at random."""

POLICY_GRADIENT_RATES = LearningRates(
    full=1e-6, adapter=1e-5, source=f"the default of TRL's GRPOConfig and RLOOConfig; {_TEN_TIMES}"
)

UNKNOWN_RATES = LearningRates(
    full=PREFERENCE_RATES.full, adapter=PREFERENCE_RATES.adapter, source="as for dpo, since the loss declares none"
)
"""A user's loss that reads log-probs."""

UNKNOWN_REWARD_RATES = LearningRates(
    full=REWARD_RATES.full, adapter=REWARD_RATES.adapter, source="as for bradley_terry, since the loss declares none"
)
"""A user's loss that reads rewards."""


def lowest(rates: Iterable[tuple[str, LearningRates]]) -> LearningRates:
    """The rates for a sum of losses: the lowest of its parts, since a rate too high for one spoils the others."""
    name, found = min(rates, key=lambda item: (item[1].full, item[1].adapter))
    return LearningRates(
        full=found.full, adapter=found.adapter, source=f"the lowest of its parts, {name}: {found.source}"
    )
