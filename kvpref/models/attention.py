"""The attention function and the mask function that `attach` registers with transformers.

How a pass reaches the layers: the mask function is the one place where every model asks for something per forward and
passes the answer to every attention call, even in models that drop unknown keyword arguments. So the mask *is* the
pass, as layers of that kind see it: the mask function reads their rule and returns a `LayersPass`, which travels as the
`attention_mask` argument.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpref.errors import UnsupportedModelError
from kvpref.models.both_ways import padded_mask_arguments
from kvpref.models.masks import MaskFunction, read_rule
from kvpref.models.running_pass import LayersPass, RunningPass, current_pass
from kvpref.models.temperature import at_positions
from kvpref.ops.attention import AttentionParams
from kvpref.prefix.rules import CAUSAL

ATTENTION_NAME = "kvpref"
EAGER_NAME = "kvpref_eager"
"""The name for models whose ordinary forwards `sdpa` cannot run: those with softcapped scores or sinks."""

_Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

# Keyword arguments of attention calls that do not change what a layer computes. `sliding_window` may be wrong; the
# window comes from the mask function.
_HARMLESS_KWARGS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "sliding_window",
        "is_causal",
        "output_attentions",
        "output_router_logits",
    }
)


def register() -> None:
    """Register the functions with transformers under both names; idempotent."""
    for name, mask, attention in ((ATTENTION_NAME, sdpa_mask, _sdpa), (EAGER_NAME, eager_mask, _eager)):
        ALL_ATTENTION_FUNCTIONS.register(name, partial(attention_function, attention))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, partial(mask_function, mask))


def attention_name(model: PreTrainedModel) -> str:
    """The name under which a model's layers find kvpref's attention."""
    return ATTENTION_NAME if model._supports_sdpa else EAGER_NAME


Implementation = str | dict[str, Any]
"""What `set_attn_implementation` takes: a name, or names by part of the model."""


def select(model: PreTrainedModel, name: str) -> Implementation:
    """Make the text layers of a model attend through the functions of this name.

    Towers keep their implementation: their rows are not sequences, and a faster kernel may have been loaded.

    Returns:
        The previous selection, for `deselect`.
    """
    text = model.config.get_text_config(decoder=True)
    before = _by_part(model.config, text, lambda config: config._attn_implementation)
    model.set_attn_implementation(_by_part(model.config, text, lambda _: name))
    return before


def deselect(model: PreTrainedModel, before: Implementation) -> None:
    """Undo `select`."""
    model.set_attn_implementation(before)


def _by_part(config: Any, text: Any, name: Callable[[Any], Any]) -> Implementation:
    """The names for a config and all configs down to the text's."""
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None and (part is text or text in _parts(part)):
            below = _by_part(part, text, name)
            return {"": name(config), key: below}
    found: Implementation = name(config)
    return found


def _parts(config: Any) -> list[Any]:
    """The configs inside a config."""
    own = [part for key in config.sub_configs if (part := getattr(config, key, None)) is not None]
    return own + [inner for part in own for inner in _parts(part)]


def is_selected(config: Any) -> bool:
    """Whether the text layers of a model run kvpref's attention.

    The model's own config does not tell: some towers keep a model from choosing for itself (GOT-OCR2).
    """
    return config.get_text_config(decoder=True)._attn_implementation in (ATTENTION_NAME, EAGER_NAME)


def mask_function(
    ordinary: Callable[..., torch.Tensor | None], *args: Any, **kwargs: Any
) -> LayersPass | torch.Tensor | None:
    """The running pass under the rule of the calling layers; outside a pass, the `ordinary` mask."""
    running = current_pass()
    if running is None:
        return ordinary(*args, **padded_mask_arguments(kwargs))
    model_mask: MaskFunction = kwargs.get("mask_function", causal_mask_function)
    try:
        rule = read_rule(model_mask, running.num_positions)
        return LayersPass(running, running.both_ways.applied(rule, model_mask))
    except UnsupportedModelError as error:
        return _Refused(running, error)


class _Refused(LayersPass):
    """Stands in for masks that no blocks can express: such layers are refused once they attend.

    Not earlier: Qwen2-MoE makes masks for windows of no tokens, which none of its layers uses.
    """

    def __init__(self, running: RunningPass, error: UnsupportedModelError) -> None:
        super().__init__(running, CAUSAL)
        self._error = error

    def attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise self._error


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_inside_a_pass() -> bool:
    """Whether a pass is running; asked once per graph in compiled layers, which cannot read context variables."""
    return current_pass() is not None


def attention_function(
    ordinary: _Attention,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LayersPass | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention for transformers models: cascade inside a pass, the `ordinary` one outside.

    Args:
        query: (B, H, T, D); key (B, G, T, D); value (B, G, T, E). B is 1 inside a pass.
        attention_mask: What `mask_function` returned.
        kwargs: May hold ``s_aux``, the sinks (H,), and ``softcap``; see `AttentionParams`.

    Returns:
        (B, T, H, E), and None in place of attention weights inside a pass.

    Raises:
        UnsupportedModelError: If the layer asks for something that would change the result: dropout, or a keyword
            argument unknown to kvpref.
    """
    if not isinstance(attention_mask, LayersPass):
        if _is_inside_a_pass():
            raise UnsupportedModelError(
                f"{type(module).__name__} attends with a mask that was not made by transformers' mask functions, so "
                "kvpref cannot read what it sees"
            )
        return ordinary(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout > 0:
        raise UnsupportedModelError(
            f"attention dropout {dropout} makes two forwards differ; set attention_dropout (attn_pdrop) to 0"
        )
    sink, softcap = kwargs.pop("s_aux", None), kwargs.pop("softcap", None)
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
    q = at_positions(module, q, attention_mask.running.plan.position_ids)
    params = AttentionParams(scale=scale, softcap=softcap)
    return attention_mask.attend(module, q, k, v, params, sink).unsqueeze(0), None


def _sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    attention: _Attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attention(module, *args, **kwargs)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The family's own eager attention, found in the module of its attention class."""
    for kind in type(module).__mro__:  # wrappers such as FSDP2 make classes in other modules
        attention = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if attention is not None:
            found: tuple[torch.Tensor, torch.Tensor | None] = attention(module, *args, **kwargs)
            return found
    raise UnsupportedModelError(
        f"{type(module).__name__} has no eager attention in its module, and its model does not support sdpa"
    )
