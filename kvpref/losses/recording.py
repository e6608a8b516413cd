"""A loss that also passes its inputs to a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvpref.losses.interface import LossOutput, PreferenceLoss, loss_name
from kvpref.plan.batch import Batch
from kvpref.records.requests import HeadOptions


class RecordingLoss(PreferenceLoss):
    """Another loss, with a callback that sees the policy's outputs without gradient.

    Args:
        loss: The loss to compute.
        record: Called with the `ResponseLogps` or `ResponseRewards` of each micro-batch, under `torch.no_grad`.
    """

    def __init__(self, loss: PreferenceLoss, record: Callable[[Any], None]) -> None:
        self._loss, self._record = loss, record
        self.__name__ = loss_name(loss)
        self.needs_reference, self.reads, self.unit = loss.needs_reference, loss.reads, loss.unit

    @property
    def head(self) -> HeadOptions:
        return self._loss.head

    @property
    def columns(self) -> tuple[str, ...]:
        return self._loss.columns

    def __call__(self, policy: Any, reference: Any, batch: Batch) -> LossOutput:
        with torch.no_grad():
            self._record(policy)
        return self._loss(policy, reference, batch)

    def num_units(self, batch: Batch) -> float:
        return self._loss.num_units(batch)
