"""MiniMax's lightning attention. Its forward contains the recurrence itself, so a pass replaces all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from kvpref.models.mixers.call import MixerCall
from kvpref.ops.recurrent import decayed_attention


def lightning_forward(module: Any, call: MixerCall, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
    """The layer's output for (1, T, hidden_size), and None in place of its state."""
    num_heads, head_dim = module.num_attention_heads, module.head_dim
    qkv = module.act_fn(module.qkv_proj(hidden_states[0])).unflatten(-1, (num_heads, 3 * head_dim))
    slopes = module.slope_rate.flatten()

    def scan(rows: tuple[torch.Tensor, ...], initial: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value, is_token = rows
        return decayed_attention(query, key, value, slopes, is_token, initial)

    is_token = slopes.new_ones(hidden_states.shape[1])
    out = call.scan(scan, *qkv.split(head_dim, dim=-1), is_token).flatten(1)
    gate = functional.sigmoid(module.output_gate(hidden_states[0]))
    return module.out_proj(gate * module.norm(out)).unsqueeze(0), None
