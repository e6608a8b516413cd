"""`kvpref.attach`: supported models at once, others after a comparison with their own forward."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from kvpref.engine.verification import compare_unattached
from kvpref.errors import UnsupportedModelError
from kvpref.models import attach as attaching
from kvpref.models.support import SAFE_FALLBACK, unwrap

M = TypeVar("M", bound=nn.Module)


def attach(model: M, *, verify: bool = False, padded_only: bool = False) -> M:
    """Select kvpref's attention on a model, after checking that the model is supported.

    The model keeps working as before: ordinary forwards and `generate` use `sdpa` attention, or the family's eager one
    where `sdpa` lacks what it needs. Attach before wrapping in DDP or sharding with FSDP; PEFT models may be attached
    before or after `get_peft_model`. Calling it again does nothing.

    Args:
        model: A causal language model, possibly inside PEFT.
        verify: Run two short groups of random tokens through the model's own forward and through kvpref, and compare
            log-probs and every gradient. A model of a family that nobody has checked is accepted if they are equal.
        padded_only: Accept models of families that are exact in mode ``padded`` only (docs/models.md); other modes
            then refuse them. Other models are attached as usual.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: If results would not be exact; the message says why and what works instead.
    """
    if not verify:
        return attaching.attach(model, padded_only=padded_only)
    inner = unwrap(model)
    if attaching.is_attached(inner):
        return model
    errors = compare_unattached(inner)
    if not errors.within_tolerance:
        attaching.detach(inner)
        raise UnsupportedModelError(
            f"{type(inner).__name__} is not computed exactly: log-probs are off by up to {errors.max_logp_error:.1e} "
            f"nats (rounding explains {errors.logp_tolerance:.0e}), the gradient of {errors.worst_parameter} by "
            f"{errors.max_gradient_error:.1e} of its norm (rounding: {errors.gradient_tolerance:.0e}). {SAFE_FALLBACK}"
        )
    return model
