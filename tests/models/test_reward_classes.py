"""Reward models of families for which transformers has no class: exact, and loadable by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Result, assert_same, grads_of
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from vision_families import build_vision_config
from vision_models import VisionGroups, randomise, tiny_vision_model, vision_groups

import kvpref
from kvpref.models.classes import model_class

FAMILIES = ["qwen2_5_vl", "gemma3", "llava"]
# float32; shared prefixes and rows of one sequence add up in different orders
TOLERANCE = 1e-3


def reward_model(name: str) -> PreTrainedModel:
    config: Any = build_vision_config(name)
    config.num_labels = 1
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config, "ends").from_config(config, attn_implementation="eager")
    randomise(model)
    return model


def own_rewards(model: PreTrainedModel, made: VisionGroups) -> torch.Tensor:
    """Each sequence alone, by the model's own forward."""
    return torch.stack([model(**inputs, use_cache=False).logits.squeeze() for inputs in made.inputs])


def without_nulls(result: Result, truth: Result) -> Result:
    """Without what is zero but for rounding: keys of a tower have biases, which softmax does not see."""
    largest = max(item.norm() for item in truth.grads.values())
    kept = {name for name, item in truth.grads.items() if item.norm() > 1e-7 * largest}
    return Result(result.token_logps, {name: item for name, item in result.grads.items() if name in kept})


@pytest.mark.parametrize("name", FAMILIES)
def test_rewards_and_gradients_with_images_are_those_of_each_sequence_alone(name: str) -> None:
    model, made = reward_model(name), vision_groups(name)
    rewards = own_rewards(model, made)
    weights = torch.linspace(-1, 1, len(rewards))
    (rewards * weights).sum().backward()
    expected = Result(rewards.detach(), grads_of(model))
    model.zero_grad(set_to_none=True)
    rewards = kvpref.response_rewards(kvpref.attach(model), kvpref.collate(made.groups)).rewards
    (rewards * weights).sum().backward()
    torch.testing.assert_close(rewards.detach(), expected.token_logps, atol=1e-4, rtol=0)
    found = Result(rewards.detach(), grads_of(model))
    assert_same(without_nulls(found, expected), without_nulls(expected, expected), TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_alone_loads_what_was_saved(name: str, tmp_path: Path) -> None:
    model, made = reward_model(name).eval(), vision_groups(name)
    model.save_pretrained(tmp_path)
    whole, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(reward_model(name)) is type(model)  # what was loaded as remote code does not take its place
    torch.testing.assert_close(own_rewards(whole.eval(), made), own_rewards(model, made))
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_language_model_becomes_a_reward_model(name: str, tmp_path: Path) -> None:
    tiny_vision_model(name).save_pretrained(tmp_path)
    config = build_vision_config(name)
    model, info = model_class(config, "ends").from_pretrained(tmp_path, num_labels=1, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    again = model_class(config, "tokens").from_pretrained(tmp_path)
    kept = dict(again.named_parameters())
    for key, item in model.named_parameters():
        assert key == "score.weight" or torch.equal(item, kept[key])
