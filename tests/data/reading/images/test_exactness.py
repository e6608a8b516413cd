"""What is read from a file trains as the model's own forward does on what its own processor makes."""

from __future__ import annotations

import json

import pytest
import torch
from oracle import assert_same, shared
from vision_families import FAMILIES, build_vision_processor
from vision_models import VisionGroups, naive_vision_run, own_inputs, picture, tiny_vision_model

import kvpref
from kvpref.data import load_preferences

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "Which?"}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_rows_with_image_paths_are_exact(name, tmp_path):
    pictures = {"a.png": picture(1), "b.png": picture(2, 64, 36)}
    for file, made in pictures.items():
        made.save(tmp_path / file)
    prompts = [[IMAGE, TEXT, IMAGE], [TEXT, IMAGE], [TEXT]]
    files = [["a.png", "b.png"], ["a.png"], []]
    rows = [
        {
            "prompt": [{"role": "user", "content": parts}],
            "images": own,
            "responses": ["A", "Bc", "Bd"],
            "scores": [1, 2, 3],
        }
        for parts, own in zip(prompts, files, strict=True)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    processor = build_vision_processor(name)
    groups = list(load_preferences(path, processor))
    inputs = []
    for group, row in zip(groups, rows, strict=True):
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        images = [pictures[file] for file in row["images"]]
        made = processor(
            text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False
        )
        for sequence in group.sequences:
            response = list(sequence.input_ids[sequence.scored.index(True) :])
            inputs.append(own_inputs(FAMILIES[name], made, response))
            assert torch.equal(inputs[-1]["input_ids"][0], torch.tensor(sequence.input_ids))
    truth = naive_vision_run(tiny_vision_model(name, torch.float64), VisionGroups(groups, inputs))
    found = shared(kvpref.attach(tiny_vision_model(name, torch.float64)), kvpref.collate(groups), mode="two_pass")
    biases = [key for key in truth.grads if key.endswith("k_proj.bias") and "vision" in key]
    for key in biases:  # softmax does not see them: zero but for rounding
        del truth.grads[key], found.grads[key]
    assert_same(found, truth, 1e-10)
