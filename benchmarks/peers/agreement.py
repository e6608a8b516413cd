"""Checks, before any timing, that two runners compute the same numbers."""

from __future__ import annotations

import math

import torch

from peers.interface import DisagreementError, FirstBatch

LOGP_TOLERANCE = 1e-5
"""Relative, for log-probs and the loss. Both runners hold float32 weights and sum the same terms in another order: one
rounding is 6e-8, and a log-prob of some hundred nats adds up about as many tokens' errors of that size."""

GRADIENT_TOLERANCE = 1e-4
"""Relative L2 distance of the whole gradient. Each entry adds thousands of tokens' contributions of both signs, which
cancel in part, so rounding weighs more than in the loss; a gradient without the prompt's part is off far more."""

LOSS_TOLERANCE = 1e-3
"""Relative, for the losses after updates. AdamW's first updates divide each gradient entry by its own size, so where an
entry is mostly rounding the weights move apart by up to the learning rate."""


def check_agreement(ours: FirstBatch, theirs: FirstBatch) -> dict[str, float | None]:
    """Compare what two runners compute on the same first batch.

    Returns:
        Relative differences: the largest of ``logps``, of the ``loss``, and of the ``gradient`` (None if not compared).

    Raises:
        DisagreementError: If a difference is above its tolerance, or not a number.
    """
    if ours.logps.shape != theirs.logps.shape:
        raise DisagreementError(f"{len(theirs.logps)} log-probs where kvpref has {len(ours.logps)}")
    differences: dict[str, float | None] = {
        "logps": ((theirs.logps - ours.logps).abs() / ours.logps.abs()).max().item(),
        "loss": abs(theirs.loss - ours.loss) / abs(ours.loss),
        "gradient": _gradient_difference(ours.gradient, theirs.gradient),
    }
    tolerances = {"logps": LOGP_TOLERANCE, "loss": LOGP_TOLERANCE, "gradient": GRADIENT_TOLERANCE}
    for name, tolerance in tolerances.items():
        difference = differences[name]
        if difference is not None and not difference <= tolerance:
            raise DisagreementError(
                f"computes something else: {name} differ by {difference:.2e} relative, above {tolerance:.0e}"
            )
    return differences


def check_losses(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference between the losses of two trainings, step by step.

    Raises:
        DisagreementError: If it is above `LOSS_TOLERANCE`, or not a number.
    """
    differences = [abs(their - our) / abs(our) for our, their in zip(ours, theirs, strict=True)]
    for step, difference in enumerate(differences, start=1):
        if not difference <= LOSS_TOLERANCE:
            raise DisagreementError(
                f"trains differently: losses of step {step} differ by {difference:.2e} relative, "
                f"above {LOSS_TOLERANCE:.0e}"
            )
    return max(differences)


def _gradient_difference(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float | None:
    if ours is None or theirs is None:
        return None
    if ours.shape != theirs.shape:
        return math.inf
    return float((theirs - ours).norm() / ours.norm())
