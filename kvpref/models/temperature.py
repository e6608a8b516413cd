"""Llama 4 scales the queries of layers without rotary embeddings by how far along they are. It takes a token's place in
the row for its place in the sequence, and in a pass these differ.
"""

from __future__ import annotations

from typing import Any

import torch


def at_positions(module: Any, query: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The queries of an attention call, scaled by positions in place of rows; of other models, as they are.

    Args:
        module: The layer's attention.
        query: (T, H, D).
        position_ids: (1, T) int64.
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    rows = torch.arange(query.shape[0], device=query.device)
    ratio = _temperature(module, position_ids[0]) / _temperature(module, rows)
    return (query * ratio[:, None, None]).to(query.dtype)


def _temperature(module: Any, places: torch.Tensor) -> torch.Tensor:
    """As in transformers' `Llama4TextAttention`; (T,) fp32."""
    return torch.log1p(torch.floor((places.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
