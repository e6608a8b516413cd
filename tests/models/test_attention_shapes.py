"""What configs and modules tell of attention layers, recurrences and experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvpref.models.attention_shapes import attention_shapes
from kvpref.models.shape import model_shape
from kvpref.plan.flops import AttentionShape
from kvpref.prefix.rules import CAUSAL, Rule

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
NEAR = Rule("window", 5)


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[name](**{**SIZES, **changes})


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def kinds_of(name: str, **changes: Any) -> dict[Rule, int]:
    kinds = attention_shapes(model_of(config_of(name, **changes)))
    return {kind.rule: kind.num_layers for kind in kinds}


ALTERNATING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama", {}, {CAUSAL: 4}),
        ("mistral", {"sliding_window": 5}, {NEAR: 4}),
        ("mistral", {"sliding_window": None}, {CAUSAL: 4}),
        ("gemma3_text", {"sliding_window": 5, "layer_types": ALTERNATING}, {NEAR: 3, CAUSAL: 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}, {CAUSAL: 3, NEAR: 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 5}, {CAUSAL: 4}),
        ("llama4_text", {"attention_chunk_size": 6}, {Rule("chunk", 6): 3, CAUSAL: 1}),
        ("gpt_oss", {"sliding_window": 5, "num_local_experts": 4}, {NEAR: 2, CAUSAL: 2}),
        ("qwen3_next", {"num_experts": 4}, {CAUSAL: 1}),
    ],
)
def test_rules_of_layers(name: str, changes: dict[str, Any], expected: dict[Rule, int]) -> None:
    assert kinds_of(name, **changes) == expected


def test_sizes_of_layers() -> None:
    (llama,) = attention_shapes(model_of(config_of("llama")))
    assert llama == AttentionShape(num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16)
    latent = config_of(
        "deepseek_v3",
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=12,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
    )
    (deepseek,) = attention_shapes(model_of(latent))
    assert (deepseek.head_dim, deepseek.value_dim, deepseek.num_kv_heads) == (16, 12, 4)
    (gpt2,) = attention_shapes(model_of(CONFIG_MAPPING["gpt2"](n_embd=32, n_layer=3, n_head=4, vocab_size=101)))
    assert gpt2 == AttentionShape(num_layers=3, num_heads=4, num_kv_heads=4, head_dim=8, value_dim=8)


def test_a_token_runs_through_the_experts_it_is_sent_to() -> None:
    config = config_of("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
    shape = model_shape(model_of(config))
    attention = 32 * 64 + 2 * 32 * 32 + 64 * 32
    experts = 2 * 3 * 32 * 24 + 8 * 32  # gate, up and down of two, and the router
    assert shape.linear_weights == 4 * (attention + experts)


def test_recurrences_cost_by_the_token() -> None:
    config = config_of(
        "qwen3_next",
        num_experts=0,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        linear_conv_kernel_dim=4,
    )
    channels = 2 * 2 * 8 + 4 * 6
    assert model_shape(model_of(config)).recurrent_flops == 3 * (2 * 3 * 4 * 8 * 6 + 2 * channels * 4)
    mamba = CONFIG_MAPPING["mamba2"](
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=4, n_groups=1
    )
    shape = model_shape(model_of(mamba))
    assert shape.attention == ()
    assert shape.recurrent_flops == 2 * (2 * 2 * 64 * 4 + 2 * (64 + 2 * 4) * 4)


def test_the_text_part_of_a_model_of_several_kinds_of_input() -> None:
    text = {**SIZES, "sliding_window": 5, "layer_types": ALTERNATING}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision)
    shape = model_shape(model_of(config))
    both_ways = {replace(rule, bidirectional=True): rule for rule in (NEAR, CAUSAL)}  # inside images
    assert {kind.rule: kind.num_layers for kind in shape.attention} == dict(zip(both_ways, (3, 1), strict=True))
    as_text = tuple(replace(kind, rule=both_ways[kind.rule]) for kind in shape.attention)
    assert replace(shape, attention=as_text) == model_shape(model_of(config_of("gemma3_text", **text)))
