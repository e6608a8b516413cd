"""Linear attention with a decay per head (Lightning Attention, Qin et al. 2024, arXiv 2401.04658), with a state.

Shape legend: R rows, L tokens, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_BLOCK = 64


def decayed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    is_token: torch.Tensor,
    initial: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(-slope) S_(t-1) + key_t value_t^T, and query_t S_t.

    Args:
        query: (R, L, H, D).
        key: (R, L, H, D).
        value: (R, L, H, D).
        slopes: (H,), at least 0.
        is_token: (R, L), 1 for tokens and 0 for the padding after them, which leaves the state as it is.
        initial: (R, H, D, D), the states to begin with; None for zeros.

    Returns:
        The output (R, L, H, D), and the states (R, H, D, D) after the last token.
    """
    length = query.shape[1]
    padding = -length % _BLOCK
    # (R, H, blocks, block, D) each, and the logarithm of the decay since the block began, (R, H, blocks, block).
    query, key, value = (
        functional.pad(tensor, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, _BLOCK)).permute(0, 3, 1, 2, 4)
        for tensor in (query, key, value)
    )
    wide = torch.promote_types(query.dtype, torch.float32)
    counts = functional.pad(is_token.to(wide), (0, padding)).unflatten(1, (-1, _BLOCK)).cumsum(-1)
    since = -slopes.to(wide).view(1, -1, 1, 1) * counts.unsqueeze(1)
    above = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=query.device).triu(1)
    between = (since.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(above, float("-inf")).exp()
    inside = (query @ key.transpose(-1, -2) * between.to(query.dtype)) @ value
    reads = query * since.exp().to(query.dtype).unsqueeze(-1)
    until = (since[..., -1:] - since).exp().to(query.dtype).unsqueeze(-1)
    added = (key * until).transpose(-1, -2) @ value
    decays = since[..., -1].exp().to(query.dtype)[..., None, None]
    state = torch.zeros_like(added[:, :, 0]) if initial is None else initial.to(added.dtype)
    begins = []
    for factor, item in zip(decays.unbind(2), added.unbind(2), strict=True):
        begins.append(state)
        state = factor * state + item
    out = inside + reads @ torch.stack(begins, dim=2)
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length], state
