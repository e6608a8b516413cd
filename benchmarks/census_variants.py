"""Variants of families that the census checks besides their default configuration; data only."""

from __future__ import annotations

from typing import Any

from census_settings import MIXED_WINDOWS, ROPE, SETTINGS

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama:llama3": {"rope_parameters": _LLAMA_3, "attention_bias": True, "mlp_bias": True},
    "llama:linear": {"rope_parameters": _LINEAR, "tie_word_embeddings": True},
    "llama:yarn": {"rope_parameters": _YARN},
    "mistral:full": {"sliding_window": None},
    "mixtral:full": {"sliding_window": None},
    "ministral3:temperature": {
        "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}
    },
    "phi3:window": {"sliding_window": 5, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "qwen2:windows": {"use_sliding_window": True, "max_window_layers": 1, **MIXED_WINDOWS},
    "qwen3:windows": {"use_sliding_window": True, "max_window_layers": 1, **MIXED_WINDOWS},
    "qwen3:yarn": {"rope_parameters": _YARN, "tie_word_embeddings": True},
    "qwen2_moe:windows": {"use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 3},
    "qwen3_moe:windows": {"use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 3},
    "cohere:qk_norm": {"use_qk_norm": True},
    "glm4_moe:qk_norm": {"use_qk_norm": True},
    "stablelm:parallel": {"use_qkv_bias": False, "qk_layernorm": True, "use_parallel_residual": True},
    "persimmon:plain": {"qk_layernorm": False},
    "phi:qk_norm": {"qk_layernorm": True},
    "granite:real": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.2,
        "logits_scaling": 8.0,
        "tie_word_embeddings": True,
    },
    "granitemoe:real": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.2,
        "logits_scaling": 6.0,
    },
    "granitemoehybrid:real": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.2,
        "logits_scaling": 6.0,
    },
    "falcon_h1:real": {
        "lm_head_multiplier": 0.04,
        "embedding_multiplier": 5.6,
        "mlp_multipliers": [0.88, 0.18],
        "key_multiplier": 0.4,
        "attention_out_multiplier": 0.94,
        "attention_in_multiplier": 1.1,
        "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.35],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.24,
        "mamba_rms_norm": True,
    },
    "bart:scaled": {"scale_embedding": True},
    "blenderbot:scaled": {"scale_embedding": True},
    "blenderbot-small:scaled": {"scale_embedding": True},
    "marian:scaled": {"scale_embedding": True},
    "mbart:scaled": {"scale_embedding": True},
    "pegasus:scaled": {"scale_embedding": True},
    "plbart:scaled": {"scale_embedding": True},
    "biogpt:unscaled": {"scale_embedding": False},
    "gemma2:full": {"layer_types": ["full_attention"], "num_hidden_layers": 2},
    "gemma3_text:softcap": {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0},
    "gpt_neox:sequential": {"use_parallel_residual": False, "attention_bias": False},
    "gpt2:inverse": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode:heads": {"multi_query": False},
    "opt:projected": {"word_embed_proj_dim": 24, "do_layer_norm_before": False},
    "olmoe:clipped": {"clip_qkv": 1.0},
    "deepseek_v3:no_q_lora": {"q_lora_rank": None},
    "minimax_m2:window": {"sliding_window": 5},
    "starcoder2:full": {"sliding_window": None},
    "zamba2:adapters": {"use_shared_attention_adapter": True, "adapter_rank": 8, "use_mem_rope": True},
    "doge:moe": {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2},
    "mistral3:text": {"class": "Mistral3ForConditionalGeneration"},
    "llama4:conditional": {"class": "Llama4ForConditionalGeneration", **SETTINGS["llama4"]},
    "qwen3_5:conditional": {"class": "Qwen3_5ForConditionalGeneration"},
    "qwen3_5_moe:conditional": {"class": "Qwen3_5MoeForConditionalGeneration"},
}
