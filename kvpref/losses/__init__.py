"""Losses: one registry, one file per family, pure functions of log-probs and the batch's labels and scores."""

from __future__ import annotations

from typing import Any

from kvpref.errors import InputError
from kvpref.losses.dpo import DPO
from kvpref.losses.interface import LossFunction, LossOutput, PreferenceLoss, RewardLoss, as_loss, loss
from kvpref.losses.sft import SFT

LOSSES: dict[str, type[PreferenceLoss]] = {"dpo": DPO, "sft": SFT}


def make_loss(name: str, **settings: Any) -> PreferenceLoss:
    """The registered loss `name` with its settings.

    Raises:
        InputError: If there is no such loss, or it has no such setting; the message lists the valid ones.
    """
    if name not in LOSSES:
        raise InputError(f"unknown loss {name!r}; choose from: {', '.join(LOSSES)}")
    valid = list(getattr(LOSSES[name], "__dataclass_fields__", {}))
    unknown = [setting for setting in settings if setting not in valid]
    if unknown:
        raise InputError(f"loss {name!r} has no setting {unknown[0]!r}; it has: {', '.join(valid) or 'none'}")
    return LOSSES[name](**settings)


__all__ = [
    "DPO",
    "LOSSES",
    "SFT",
    "LossFunction",
    "LossOutput",
    "PreferenceLoss",
    "RewardLoss",
    "as_loss",
    "loss",
    "make_loss",
]
