"""Tiny random models of every family with recurrent or convolution layers, sized so that these matter."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny_models import VOCAB_SIZE
from transformers import AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_DELTA: dict[str, Any] = {
    **_SIZES,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MAMBA_2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_chunk_size": 8,
}
_MAMBA: dict[str, Any] = {**_COMMON, "hidden_size": 32, "state_size": 5, "num_hidden_layers": 2, "time_step_rank": 4}

# By the name of the config's class, without "Config".
_CONFIGS: dict[str, dict[str, Any]] = {
    "Bamba": {**_SIZES, **_MAMBA_2, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "FalconH1": {
        **_SIZES,
        **_MAMBA_2,
        "num_hidden_layers": 2,
        "mamba_d_ssm": 64,
        "head_dim": 8,
        "ssm_multipliers": [0.5, 0.7, 0.9, 1.1, 1.3],
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.6,
    },
    "FalconMamba": _MAMBA,
    "GraniteMoeHybrid": {
        **_SIZES,
        **_MAMBA_2,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "embedding_multiplier": 2.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "Jamba": {
        **_SIZES,
        "num_hidden_layers": 3,
        "attn_layer_offset": 1,
        "attn_layer_period": 3,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 4,
        "mamba_d_state": 5,
        "mamba_dt_rank": 4,
    },
    "KimiLinear": {
        **_SIZES,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 16,
    },
    "Lfm2": {**_SIZES, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True},
    "Lfm2Moe": {
        **_SIZES,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
    "Mamba": _MAMBA,
    "Mamba2": {
        **_COMMON,
        "hidden_size": 32,
        "state_size": 6,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "MiniMax": {
        **_SIZES,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 8,
        "block_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "NemotronH": {
        **_SIZES,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 6,
        "chunk_size": 8,
    },
    "OlmoHybrid": _DELTA,
    "Qwen3Next": {**_DELTA, **_EXPERTS, "head_dim": 8},
    "Qwen3_5Text": {**_DELTA, "head_dim": 8},
    "Qwen3_5MoeText": {**_DELTA, **_EXPERTS, "head_dim": 8},
    "Zamba": {
        **_SIZES,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_key_value_heads": 4,
        "mamba_d_state": 5,
        "mamba_dt_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "Zamba2": {
        **_SIZES,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_key_value_heads": 4,
        "mamba_d_state": 6,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 2,
        "chunk_size": 8,
        "attention_head_dim": 16,
        "use_mem_rope": True,
    },
}

HYBRIDS = tuple(_CONFIGS)


def hybrid_families() -> set[str]:
    """Their names in kvpref.models.families."""
    return {getattr(transformers, f"{name}Config").model_type for name in HYBRIDS}


def tiny_hybrid(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in training mode whose recurrent layers, gates and norms all weigh in what it computes."""
    config = getattr(transformers, f"{name}Config")(**_CONFIGS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if dtype == torch.float64:  # for which there is no grouped matrix product
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(_value(parameter_name, noise, parameter))
    model = model.to(dtype).train()
    for module in model.modules():
        if hasattr(module, "decay_factors"):  # constants that were rounded to fp32
            module.query_decay, module.key_decay, module.diagonal_decay = module.decay_factors(module.slope_rate)
    return model


def _value(name: str, noise: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    last = name.rsplit(".", 1)[-1]
    if last == "A_log":  # decays of a half in one to ten tokens
        return noise * 0.5 - 1.0
    if last in ("dt_bias", "dt_proj_bias"):
        return noise * 0.5
    if last == "D" or noise.ndim == 1:  # norms around 1, biases around 0
        return (1.0 if last in ("D", "weight") else 0.0) + 0.3 * noise
    if "conv" in name:
        return noise * 0.5
    return noise * (noise.shape[-1] ** -0.5 if noise.ndim > 1 else 0.3)
