"""Tiny random models of every supported family, with the features switched on that real checkpoints use.

Sizes are small enough for one exactness test to take a fraction of a second, and odd enough (GQA, head dims that are
not hidden/heads, prime vocabulary) that a wrong reshape cannot pass by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

VOCAB_SIZE = 101

_COMMON: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _partial_rope(factor: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in _SIZES.items() if name not in names}


# By variant; the part before the colon is the family's name in kvpref.models.families.
_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma": lambda: GemmaConfig(**{**_SIZES, "num_key_value_heads": 1}, head_dim=16, attention_bias=True),
    "gpt2": lambda: GPT2Config(
        **_COMMON,
        n_positions=512,
        n_embd=32,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gpt2:plain": lambda: GPT2Config(
        **_COMMON, n_positions=512, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **_without("num_key_value_heads"), use_parallel_residual=True, rope_parameters=_partial_rope(0.25)
    ),
    "gpt_neox:sequential": lambda: GPTNeoXConfig(
        **_without("num_key_value_heads"),
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters=_partial_rope(1.0),
    ),
    "granite": lambda: GraniteConfig(
        **_SIZES,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.2,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    ),
    "llama": lambda: LlamaConfig(
        **_SIZES, head_dim=12, attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3_ROPE
    ),
    "llama:tied": lambda: LlamaConfig(**{**_SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SIZES, head_dim=16, sliding_window=None),
    "olmo2": lambda: Olmo2Config(**_SIZES),
    "phi3": lambda: Phi3Config(
        **{**_SIZES, "pad_token_id": 0}, original_max_position_embeddings=512, rope_parameters=_partial_rope(0.5)
    ),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16),
    "smollm3": lambda: SmolLM3Config(**{**_SIZES, "num_hidden_layers": 3}, no_rope_layers=[1, 0, 1]),
    "stablelm": lambda: StableLmConfig(
        **_SIZES, use_qkv_bias=True, qk_layernorm=False, use_parallel_residual=False, rope_parameters=_partial_rope(0.5)
    ),
    "stablelm:parallel": lambda: StableLmConfig(
        **_SIZES, use_qkv_bias=False, qk_layernorm=True, use_parallel_residual=True, rope_parameters=_partial_rope(0.25)
    ),
    # Not supported; here so that refusals are tested on real models.
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=16),
}

FAMILIES = tuple(name for name in _CONFIGS if ":" not in name and name != "gemma2")
VARIANTS = tuple(name for name in _CONFIGS if name != "gemma2")


def tiny_config(variant: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a family, or of one of its variants (``family:variant``), with attributes overridden."""
    config = _CONFIGS[variant]()
    for name, value in overrides.items():
        assert hasattr(config, name), f"{type(config).__name__} has no {name}"
        setattr(config, name, value)
    return config


def tiny_model(variant: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model in training mode, the same weights for every dtype and call."""
    return build_model(tiny_config(variant, **overrides), dtype)


def tiny_reward_model(variant: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """The same with a scalar head in place of the LM head."""
    config = tiny_config(variant, **overrides)
    config.num_labels = 1
    return build_model(config, dtype, AutoModelForSequenceClassification)


def build_model(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, auto_class: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A random model of `config` in training mode, every weight far enough from its trivial value to matter."""
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class.from_config(config, dtype=torch.float32)
        for name, parameter in sorted(model.named_parameters()):
            # Matrices at 0.1 give attention patterns that are far from uniform and logits of order one.
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 1:
                parameter.data = 0.1 * noise
            elif name.endswith("bias") or config.model_type == "gemma":
                parameter.data = 0.2 * noise  # Gemma's norms multiply by (1 + weight)
            else:
                parameter.data = 1.0 + 0.2 * noise
    return model.to(dtype).train()
