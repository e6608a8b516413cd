"""Tiny random mixtures of experts, with whatever their routers have that others lack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from tiny_models import VOCAB_SIZE, build_model
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    FlexOlmoConfig,
    GptOssConfig,
    GraniteMoeConfig,
    JetMoeConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from kvpref.models import families

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=5, num_experts_per_tok=3, sliding_window=None),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **{**_SIZES, "num_key_value_heads": 4},
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        decoder_sparse_step=1,
        use_sliding_window=True,
        max_window_layers=0,  # from this layer on none has a window
    ),
    # The first layer is dense, so fewer layers route than attend.
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0]
    ),
    "olmoe": lambda: OlmoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2),
    "phimoe": lambda: PhimoeConfig(
        **_SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None, router_jitter_noise=0.01
    ),
    "granitemoe": lambda: GraniteMoeConfig(
        **_SIZES, num_local_experts=4, num_experts_per_tok=2, logits_scaling=4.0, attention_multiplier=0.3
    ),
    "flex_olmo": lambda: FlexOlmoConfig(**_SIZES, num_experts=4, num_experts_per_tok=2),
    "minimax_m2": lambda: MiniMaxM2Config(**_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": lambda: JetMoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    ),
    "deepseek_v2": lambda: DeepseekV2Config(**_SIZES | _LATENT),
    "deepseek_v3": lambda: DeepseekV3Config(**_SIZES | _LATENT),
}
BALANCED = tuple(name for name in CONFIGS if not name.startswith("deepseek"))
"""Those whose own training has a load-balancing loss."""


def tiny_experts(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> PreTrainedModel:
    """A random model of a family of `CONFIGS`, in training mode; but routers that draw experts at random do not."""
    config = CONFIGS[name]()
    for key, value in overrides.items():
        setattr(config, key, value)
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the grouped products that transformers prefers know no float64
    model = build_model(config, dtype)
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            module.eval()
    return model


@contextmanager
def known_families() -> Iterator[None]:
    """Let `attach` take the families of `CONFIGS`."""
    some = next(iter(families.FAMILIES.values()))
    refused = {name: why for name, why in families.REFUSED.items() if name not in CONFIGS}
    with (
        mock.patch.dict(families.FAMILIES, dict.fromkeys(CONFIGS, some)),
        mock.patch.dict(families.REFUSED, refused, clear=True),
    ):
        yield
