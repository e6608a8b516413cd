"""The sizes and rules of a model's attention layers, read from its modules and config."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvpref.models.backbone import text_backbone
from kvpref.models.both_ways import BothWays, both_ways_of
from kvpref.plan.flops import AttentionShape
from kvpref.prefix.rules import CAUSAL, Rule


def attention_shapes(model: PreTrainedModel) -> tuple[AttentionShape, ...]:
    """The attention layers of the text part, grouped by kind."""
    config, both_ways = model.config.get_text_config(decoder=True), both_ways_of(model.config)
    modules = [module for module in text_backbone(model).modules() if _attends(module)]
    kinds = Counter(_shape(module, config, both_ways) for module in modules)
    return tuple(replace(kind, num_layers=count) for kind, count in kinds.items())


def _attends(module: nn.Module) -> bool:
    """Whether a module makes attention calls: in transformers, all that do have these attributes."""
    return hasattr(module, "is_causal") and _first(module, "head_dim", "head_size", "qk_head_dim") is not None


def _shape(module: nn.Module, config: Any, both_ways: BothWays) -> AttentionShape:
    key_dim = _first(module, "qk_head_dim", "head_dim", "head_size")
    assert key_dim is not None
    num_heads = _first(module, "num_heads", "num_attention_heads") or _first(config, "num_attention_heads")
    assert num_heads is not None
    groups = _first(module, "num_key_value_groups")
    num_kv_heads = _first(module, "num_key_value_heads", "num_kv_heads")
    rule = layer_rule(config, getattr(module, "layer_idx", None))
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_heads // groups if groups else num_kv_heads or num_heads,
        head_dim=key_dim,
        value_dim=_first(module, "v_head_dim") or key_dim,
        rule=both_ways.with_spans(rule, is_full=rule == CAUSAL),
    )


def layer_rule(config: Any, layer: int | None) -> Rule:
    """The rule of a layer's attention, as transformers reads it from a config to make masks."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and layer is not None and layer < len(kinds):
        kind = kinds[layer]
    else:
        sized = [(name, kind) for name, kind in _BY_SIZE if getattr(config, name, None)]
        kind = sized[0][1] if sized else "full_attention"
    sizes = {kind: getattr(config, name, None) for name, kind in _BY_SIZE}
    size = sizes.get(kind)
    return Rule(_RULES[kind], size) if size else CAUSAL


_BY_SIZE = (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention"))
"""Where the config says how many tokens layers of a kind see; without `layer_types`, the first one set is the kind of
all layers."""

_RULES = {"sliding_attention": "window", "chunked_attention": "chunk"}


def _first(owner: Any, *names: str) -> int | None:
    """The first of these attributes that is a number."""
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int)), None)
