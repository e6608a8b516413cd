"""The loss interface: a pure function of log-probs and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kvpref.batch import Batch, ResponseLogps
from kvpref.groups import Group


class LossOutput(NamedTuple):
    """What a loss returns.

    Attributes:
        loss: () scalar to minimise: a mean over the loss's units (`num_units`).
        metrics: Name -> () scalar without gradient, means over the same units, for logging.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


LossFunction = Callable[[ResponseLogps, ResponseLogps | None, Batch], LossOutput]
"""Any callable ``loss(policy, reference, batch) -> LossOutput``; `PreferenceLoss` adds what the trainer can use."""


class PreferenceLoss:
    """Base of the losses that kvpref ships. A plain function is a loss too, with these defaults.

    Attributes:
        needs_reference: Whether the loss reads reference log-probs; the trainer then computes them once.
    """

    needs_reference: bool = False

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        """Compute the loss of a micro-batch.

        Args:
            policy: Log-probs of the model that is trained.
            reference: Log-probs of the reference model, or None where none are needed.
            batch: The groups, with their scores and labels.

        Raises:
            InputError: If the batch lacks what the loss needs; the message names the group.
        """
        raise NotImplementedError

    def num_units(self, batch: Batch) -> int:
        """Over how many units the loss is a mean (groups, unless overridden).

        The trainer weights micro-batches and ranks by it, so that the loss of an optimizer step is the mean over all
        its units, however they were split.
        """
        return batch.num_groups

    def select(self, group: Group) -> Group:
        """Keep only the sequences that the loss reads, so that no others are computed."""
        return group


class FunctionLoss(PreferenceLoss):
    """A user's function as a loss: a mean over groups, with a reference if its attribute `needs_reference` says so."""

    def __init__(self, function: LossFunction) -> None:
        self.function = function
        self.needs_reference = bool(getattr(function, "needs_reference", False))

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, batch: Batch) -> LossOutput:
        return self.function(policy, reference, batch)


def as_loss(loss: PreferenceLoss | LossFunction) -> PreferenceLoss:
    """Wrap a plain function; leave a `PreferenceLoss` as it is."""
    return loss if isinstance(loss, PreferenceLoss) else FunctionLoss(loss)
