"""The scan of Mamba (Gu and Dao 2023, arXiv 2312.00752, algorithm 2), with a state to begin with.

Shape legend: R rows, L tokens, D channels, N numbers of state per channel.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch.nn import functional


def selective_scan(
    inputs: torch.Tensor,
    steps: torch.Tensor,
    decay: torch.Tensor,
    to_state: torch.Tensor,
    from_state: torch.Tensor,
    initial: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(steps_t decay) h_(t-1) + steps_t to_state_t inputs_t, and from_state_t h_t.

    Blocks of about sqrt(L) tokens run side by side from zeros, token by token; then each block's initial state, which
    decays through the block, is added. All exponents are below zero.

    Args:
        inputs: (R, L, D).
        steps: (R, L, D), at least 0; a token with step 0 leaves the state unchanged.
        decay: (D, N), at most 0.
        to_state: (R, L, N).
        from_state: (R, L, N).
        initial: (R, D, N), the states to begin with; None for zeros.

    Returns:
        The output (R, L, D), and the states (R, D, N) after the last token; in fp32, or wider if the inputs are.
    """
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    inputs, steps, decay, to_state, from_state = (
        tensor.to(dtype) for tensor in (inputs, steps, decay, to_state, from_state)
    )
    num_rows, length, num_channels = inputs.shape
    size = isqrt(length - 1) + 1
    padding = -length % size
    inputs, steps, to_state = (
        functional.pad(tensor, (0, 0, 0, padding)).unflatten(1, (-1, size)) for tensor in (inputs, steps, to_state)
    )
    # (R, L / size, size, D, N) each.
    exponents = steps.unsqueeze(-1) * decay
    added = (steps * inputs).unsqueeze(-1) * to_state.unsqueeze(-2)
    kept = exponents.exp()
    states: list[torch.Tensor] = []
    # Unbound in one call: the gradient of each separate selection would be as large as the whole.
    for factor, item in zip(kept.unbind(2), added.unbind(2), strict=True):
        states.append(factor * states[-1] + item if states else item)
    inside = torch.stack(states, dim=2)
    since = exponents.cumsum(2).exp()
    state = inputs.new_zeros(num_rows, num_channels, decay.shape[-1]) if initial is None else initial.to(dtype)
    begins = []
    for factor, item in zip(since[:, :, -1].unbind(1), states[-1].unbind(1), strict=True):
        begins.append(state)
        state = factor * state + item
    whole = (inside + since * torch.stack(begins, dim=1).unsqueeze(2)).flatten(1, 2)[:, :length]
    return torch.einsum("rldn,rln->rld", whole, from_state), state
