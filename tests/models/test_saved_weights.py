"""Weights are put back whole where files name or cut them otherwise than models do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import tiny_experts
from tiny_models import tiny_model
from transformers import PreTrainedModel
from vision_models import tiny_vision_model

import kvpref
from kvpref.errors import RunError
from kvpref.models.saved_weights import load_saved_weights, renames_weights


def build(kind: str) -> PreTrainedModel:
    return tiny_experts(kind, torch.float32) if kind == "mixtral" else tiny_vision_model(kind)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "mixtral"])
def test_every_weight_comes_back(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    kvpref.add_value_head(model).weight.data.normal_()
    assert renames_weights(model)
    model.save_pretrained(tmp_path)
    assert not load_file(tmp_path / "model.safetensors").keys() >= model.state_dict().keys()
    saved = {name: item.clone() for name, item in model.state_dict().items()}
    for item in model.parameters():
        item.data.normal_()
    load_saved_weights(model, tmp_path)
    assert all(torch.equal(item, saved[name]) for name, item in model.state_dict().items())


def test_a_missing_weight_is_an_error(tmp_path: Path) -> None:
    model = build("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(
        {name: item for name, item in load_file(path).items() if name != "model.norm.weight"}, path, {"format": "pt"}
    )
    with pytest.raises(RunError, match=r"lacks the weight 'model\.language_model\.norm\.weight'"):
        load_saved_weights(model, tmp_path)


def test_files_of_most_models_have_the_models_names() -> None:
    assert not renames_weights(tiny_model("llama"))
