"""Tiny random models of every causal language model that transformers registers, and of their variants."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from census_settings import SETTINGS, SIZES, VOCAB_SIZE
from census_variants import VARIANTS
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Queries and keys are larger than other matrices, so that attention is far from uniform; routers, so that they choose.
_SHARP = re.compile(r"(q_|k_|kv_|qkv|query|key|Wqkv|c_attn|q_proj|k_proj|router|gate\.w)")
MAX_WEIGHTS = 20_000_000
_CHOICE_BIASES = ("e_score_correction_bias", "expert_bias", "expert_biases", "balancing_biases")


def model_names() -> list[str]:
    """Every registry entry, and every variant as ``entry:variant``."""
    entries = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return entries + [name for name in VARIANTS if name.partition(":")[0] in CONFIG_MAPPING]


def tiny_config(name: str) -> PreTrainedConfig:
    """The config of a registry entry or of one of its variants."""
    entry = name.partition(":")[0]
    changes = {**SETTINGS.get(entry, {}), **VARIANTS.get(name, {})}
    config = shrunk(CONFIG_MAPPING[entry], changes)
    config._attn_implementation = "eager"
    return config


def class_of(name: str) -> Any:
    """The class that builds the model: the registry's, or the one named by a variant."""
    import transformers

    changes = VARIANTS.get(name, {})
    return getattr(transformers, changes["class"]) if "class" in changes else AutoModelForCausalLM


def build(name: str) -> PreTrainedModel:
    """A random model in evaluation mode; every weight is far enough from its trivial value to matter."""
    config = tiny_config(name)
    auto = class_of(name)
    make = auto.from_config if auto is AutoModelForCausalLM else auto._from_config
    with _without_towers(name):
        with torch.device("meta"):
            num_weights = sum(parameter.numel() for parameter in make(config, dtype=torch.float32).parameters())
        if num_weights > MAX_WEIGHTS:
            raise ValueError(f"{num_weights} weights: the census knows too few of its sizes")
        torch.manual_seed(0)
        model = make(config, dtype=torch.float32)
    randomise(model)
    built: PreTrainedModel = model.eval()
    return built


def _without_towers(name: str) -> Any:
    """The model class without towers: Gemma 3n's image tower needs a package that text does not."""
    if name.partition(":")[0] != "gemma3n":
        return nullcontext()
    make = AutoModel.from_config

    def make_text_only(config: PreTrainedConfig) -> Any:
        return make(config) if config.model_type == "gemma3n_text" else nn.Identity()

    return mock.patch("transformers.models.gemma3n.modeling_gemma3n.AutoModel.from_config", make_text_only)


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape)
        if parameter.ndim > 1 and "A_log" not in name:
            parameter.copy_((0.3 if _SHARP.search(name) else 0.1) * noise)
        else:
            # Around the family's initial values: norms around one or zero, decays around their ladder.
            start = torch.nan_to_num(parameter, nan=0.0, posinf=0.0, neginf=0.0).clamp(-20, 20)
            parameter.copy_(start + 0.2 * noise)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith(_CHOICE_BIASES) and buffer.is_floating_point():
            buffer.copy_(0.1 * torch.randn(buffer.shape))


def shrunk(
    kind: type[PreTrainedConfig], changes: Mapping[str, Any], sizes: Mapping[str, Any] = SIZES
) -> PreTrainedConfig:
    """A config whose sizes are those of `SIZES`, its sub-configs likewise.

    Args:
        kind: The config class.
        changes: Attributes of the config itself; those of a sub-config go under its name.
        sizes: Sizes by attribute name, applied wherever the attribute exists.
    """
    defaults = _defaults(kind, changes)
    values: dict[str, Any] = {name: size for name, size in sizes.items() if name in defaults}
    values.update({name: 0.0 for name, value in defaults.items() if _is_random(name, value)})
    if "kv_lora_rank" in defaults:  # latent attention: a key head per head, and head_dim is the rotated part
        values.update(num_key_value_heads=sizes["num_attention_heads"], head_dim=sizes["qk_rope_head_dim"])
    if "is_decoder" in defaults:
        values["is_decoder"] = True
    values.update(_layers(defaults, changes))
    own = {name: value for name, value in changes.items() if name not in ("class", "layer_types", "model_type")}
    for part, part_kind in kind.sub_configs.items():
        sub_changes = own.pop(part, {})
        if part_kind is AutoConfig:
            part_kind = CONFIG_MAPPING[(sub_changes or {}).get("model_type", defaults[part]["model_type"])]
        values[part] = sub_changes if sub_changes is None else _arguments(shrunk(part_kind, sub_changes, sizes))
    values.update(own)
    return kind(**values)


def _arguments(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that recreate the config; DBRX's parts accept no other names (transformers 5.17)."""
    return {
        name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "output_attentions")
    }


def _defaults(kind: type[PreTrainedConfig], changes: Mapping[str, Any]) -> dict[str, Any]:
    try:
        defaults: dict[str, Any] = kind().to_dict()
    except Exception:
        own = {name: value for name, value in changes.items() if name != "class"}
        defaults = kind(**own).to_dict()
    # A family's own names for the usual attributes.
    return {**defaults, **dict.fromkeys(kind.attribute_map.values())}


def _is_random(name: str, value: Any) -> bool:
    random = "drop" in name or "jitter" in name or "pdrop" in name
    return random and isinstance(value, float) and not isinstance(value, bool)


def _layers(defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Layer counts and kinds that include every kind of layer, the first kind also after the others."""
    kinds = changes.get("layer_types", defaults.get("layer_types"))
    distinct = list(dict.fromkeys(kinds or ()))
    num_layers = changes.get("num_hidden_layers", max(2, len(distinct) + 1 if len(distinct) > 1 else 2))
    values: dict[str, Any] = {}
    if "num_hidden_layers" in defaults:
        values["num_hidden_layers"] = num_layers
    if distinct:
        values["layer_types"] = [distinct[index % len(distinct)] for index in range(num_layers)]
    mlp_kinds = list(dict.fromkeys(defaults.get("mlp_layer_types") or ()))
    if mlp_kinds:
        values["mlp_layer_types"] = [mlp_kinds[index % len(mlp_kinds)] for index in range(num_layers)]
    return values


__all__ = ["VOCAB_SIZE", "build", "model_names", "tiny_config"]
