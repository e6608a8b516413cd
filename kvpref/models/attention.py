"""The attention function and the mask function that `attach` registers with transformers.

How a pass reaches the layers: the mask function is the one place where every model asks for something per forward and
hands the answer to every attention call, also in models that drop unknown keyword arguments. So the mask *is* the pass,
as the layers of that kind see it: the mask function reads their rule and returns a `LayersPass`, which travels as the
`attention_mask` argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpref.errors import UnsupportedModelError
from kvpref.models.masks import MaskFunction, require_causal
from kvpref.models.running_pass import LayersPass, current_pass
from kvpref.ops.attention import AttentionParams

ATTENTION_NAME = "kvpref"

# Keyword arguments of attention calls that do not change what a causal layer computes. `sliding_window` is not the
# truth about the window: the mask function is, and it has been read.
_HARMLESS_KWARGS = frozenset(
    {"position_ids", "cache_position", "use_cache", "sliding_window", "is_causal", "output_attentions"}
)


def register() -> None:
    """Make both functions known to transformers under `ATTENTION_NAME`; idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, mask_function)


def mask_function(*args: Any, **kwargs: Any) -> LayersPass | torch.Tensor | None:
    """The running pass under the rule of the layers that ask; outside a pass, the mask that `sdpa` would get."""
    running = current_pass()
    if running is None:
        mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
        return mask
    model_mask: MaskFunction = kwargs.get("mask_function", causal_mask_function)
    require_causal(model_mask, running.num_positions)
    return LayersPass(running, running.plan.levels)


def attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LayersPass | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers models: cascade inside a pass, `sdpa` outside.

    Args:
        query: (B, H, T, D); key, value: (B, G, T, D). B is 1 inside a pass.
        attention_mask: What `mask_function` returned.

    Returns:
        (B, T, H, D) and None in place of attention weights.

    Raises:
        UnsupportedModelError: If the layer asks for something that would change the result: dropout, or a keyword
            argument that kvpref does not know.
    """
    if not isinstance(attention_mask, LayersPass):
        if current_pass() is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends with a mask that was not made by transformers' mask functions, so "
                "kvpref cannot read what it sees"
            )
        sdpa: Callable[..., tuple[torch.Tensor, None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout > 0:
        raise UnsupportedModelError(
            f"attention dropout {dropout} makes two forwards differ; set attention_dropout (attn_pdrop) to 0"
        )
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS_KWARGS]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to attention, which kvpref does not know"
        )
    if torch.is_autocast_enabled(query.device.type):
        # The same cast that autocast applies to scaled_dot_product_attention.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_mask.attend(module, q, k, v, AttentionParams(scale=scale)).unsqueeze(0), None
