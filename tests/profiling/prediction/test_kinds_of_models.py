"""Predictions for models with experts, windows and nested configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvpref.engine.options import EngineOptions
from kvpref.models import families
from kvpref.profiling.prediction.model import TrainingSetup, with_num_layers
from kvpref.profiling.prediction.peak import Predictor
from kvpref.profiling.prediction.step import GroupShape

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TEXT = {**SIZES, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma3_text", TEXT),
        ("gemma3", {"text_config": TEXT, "vision_config": VISION}),
        ("qwen3_moe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    ],
)
def test_a_longer_prompt_takes_more(name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG_MAPPING[name](**settings)
    for known in (name, config.get_text_config().model_type):
        monkeypatch.setitem(families.FAMILIES, known, families.Family())
        monkeypatch.delitem(families.REFUSED, known, raising=False)
    predictor = Predictor(config, TrainingSetup(dtype=torch.float32, device_type="cpu"))
    short, long = (
        predictor.peak(EngineOptions(), GroupShape(prompt_tokens=length, response_tokens=8, num_responses=2))
        for length in (40, 400)
    )
    assert short.total_bytes < long.total_bytes


def test_layers_are_taken_off_the_text_part() -> None:
    config = CONFIG_MAPPING["gemma3"](text_config=TEXT, vision_config=VISION)
    changed = with_num_layers(config, 1)
    assert (changed.text_config.num_hidden_layers, config.text_config.num_hidden_layers) == (1, 2)
    assert changed.text_config.layer_types == ["sliding_attention"]
    assert changed.vision_config.num_hidden_layers == 1
