"""Losses: one registry, one file per family, pure functions of log-probs and the batch's labels and scores."""

from __future__ import annotations

from typing import Any

from kvpref.losses.interface import LossFunction, LossOutput, PreferenceLoss, RewardLoss, as_loss, loss, loss_name
from kvpref.losses.mixture import MPO, RPO, Mixture
from kvpref.losses.pairs.dpo import DPO
from kvpref.losses.registry import OBJECTIVES
from kvpref.losses.sft import SFT
from kvpref.losses.unpaired import KTO
from kvpref.losses.user import construct_loss, find_loss

LOSSES: dict[str, type[PreferenceLoss]] = {**OBJECTIVES, "mixture": Mixture, "mpo": MPO, "rpo": RPO}
"""The built-in losses by their registered names."""


def make_loss(name: str, **settings: Any) -> PreferenceLoss:
    """The loss `name` with its settings.

    Args:
        name: A built-in loss, an entry point of an installed package, or a user's own, as ``file.py:function`` or
            ``package.module:function``.
        **settings: Fields of the loss, or further parameters of the function.

    Raises:
        InputError: If there is no such loss, it has no such setting (the message lists the valid ones), or the user's
            code cannot be imported.
    """
    return construct_loss(name, LOSSES[name] if name in LOSSES else find_loss(name, LOSSES), settings)


def registered_name(loss: PreferenceLoss) -> str:
    """The name of a loss on the command line, or in its own code."""
    return next((name for name, kind in LOSSES.items() if kind is type(loss)), loss_name(loss))


__all__ = [
    "DPO",
    "KTO",
    "LOSSES",
    "SFT",
    "LossFunction",
    "LossOutput",
    "PreferenceLoss",
    "RewardLoss",
    "as_loss",
    "loss",
    "loss_name",
    "make_loss",
    "registered_name",
]
