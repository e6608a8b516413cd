"""Llama 4 scales the queries of layers without rotary embeddings by position. It takes a token's place in the row for
its position in the sequence, and in a pass these differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def at_positions(module: Any, query: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The queries of an attention call, scaled by positions instead of rows; unchanged for other models.

    Args:
        module: The layer's attention.
        query: (T, H, D).
        position_ids: (1, T) int64.
    """
    if not _counts_rows(module):
        return query
    rows = torch.arange(query.shape[0], device=query.device)
    ratio = _temperature(module, position_ids[0]) / _temperature(module, rows)
    return (query * ratio[:, None, None]).to(query.dtype)


def counts_rows(model: nn.Module) -> bool:
    """Whether any layer takes places in the row, padding included, for positions in the sequence."""
    return any(map(_counts_rows, model.modules()))


def _counts_rows(module: Any) -> bool:
    return bool(getattr(module, "attn_temperature_tuning", False)) and not getattr(module, "use_rope", True)


def _temperature(module: Any, places: torch.Tensor) -> torch.Tensor:
    """The factors of transformers' `Llama4TextAttention`, (T,) fp32."""
    return torch.log1p(torch.floor((places.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
