"""What recurrences and convolutions along the sequence cost, by the sizes of their modules."""

from __future__ import annotations

import math

from torch import nn

from kvpref.models.partitioned import num_values

_STATES: tuple[tuple[tuple[str, ...], int], ...] = (
    # Delta rules read the state with the key, add the value's difference, and read it with the query.
    (("num_v_heads", "head_k_dim", "head_v_dim"), 3),
    # State spaces add an input to the state and read it.
    (("intermediate_size", "ssm_state_size"), 2),
    # Lightning attention adds a key times a value, and reads it.
    (("num_attention_heads", "head_dim", "head_dim"), 2),
    # Kimi's delta rule.
    (("num_heads", "head_dim", "head_dim"), 3),
)
"""The attributes that give the size of a module's state, and how many products with the state a token takes."""


def recurrent_flops(backbone: nn.Module) -> int:
    """FLOPs per token, forward, over all layers, of the recurrence itself, whatever form a kernel computes it in."""
    return sum(_convolution(module) + _recurrence(module) for module in backbone.modules())


def _convolution(module: nn.Module) -> int:
    return 2 * num_values(module.weight) if isinstance(module, nn.Conv1d) else 0


def _recurrence(module: nn.Module) -> int:
    """FLOPs per token of one module: each product with the state costs its size."""
    if hasattr(module, "is_causal"):  # softmax attention
        return 0
    for names, num_products in _STATES:
        sizes = [getattr(module, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return 2 * num_products * math.prod(size for size in sizes if size is not None)
    return 0
