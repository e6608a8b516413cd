"""Predicted peaks of steps with images, against those that PyTorch's allocator counts on real tensors, on the CPU."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from vision_families import build_vision_config
from vision_models import VisionPrompt, picture, tiny_vision_model, vision_groups

import kvpref
from kvpref import InputError
from kvpref.engine.options import EngineOptions
from kvpref.losses import LossOutput
from kvpref.profiling.memory.peak import peak_bytes
from kvpref.profiling.memory.tracker import IMAGE_FEATURES, PIXEL_INPUTS, VISION_ACTIVATIONS
from kvpref.profiling.prediction.images import PromptStart, most_images
from kvpref.profiling.prediction.model import OPTIMIZERS, TrainingSetup
from kvpref.profiling.prediction.peak import PeakPrediction, Predictor
from kvpref.profiling.prediction.step import GroupShape

VARIANTS = {
    "full": EngineOptions(),
    "padded": EngineOptions(mode="padded"),
    "bounded": EngineOptions(schedule="bounded", max_tokens_per_chunk=128),
}
# Of what a step holds on top of weights, gradients and optimizer state: the prediction knows no buffers of matrix
# products and no scalars.
TOLERANCE = 0.02
SIZES = {"prompt_tokens": 160, "response_tokens": 48, "num_responses": 6}


def start(name: str) -> PromptStart:
    prompts = [
        VisionPrompt("Hello", (), ("a", "b")),
        VisionPrompt("Which?", (picture(1), picture(2, 64, 36)), ("a", "b")),
        VisionPrompt("Which?", (picture(1),), ("a", "b")),
    ]
    found = most_images(vision_groups(name, prompts).groups)
    assert found is not None
    return found


def predicted(name: str, options: EngineOptions, shape: GroupShape) -> PeakPrediction:
    config = build_vision_config(name)
    config._attn_implementation = "eager"
    return Predictor(config, TrainingSetup(dtype=torch.float32, device_type="cpu")).peak(options, shape, 2)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, variant, marks=() if (name, variant) in few else pytest.mark.full)
        for few in [{("qwen2_5_vl", "full"), ("llava", "padded")}]
        for name in ("qwen2_5_vl", "gemma3", "llava")
        for variant in VARIANTS
    ],
)
def test_predicted_peak_is_the_measured_one(name: str, variant: str) -> None:
    options, shape = VARIANTS[variant], GroupShape(**SIZES, start=start(name))
    found = predicted(name, options, shape)
    model = kvpref.attach(tiny_vision_model(name))
    batch = shape.batch(2, ragged=variant == "padded")
    assert len(batch.images) == 4  # groups share no image

    def step() -> None:
        kvpref.forward_backward(model, batch, lambda policy, *_: LossOutput(policy.sum().mean(), {}), **asdict(options))

    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # as after an earlier micro-batch, which is what is predicted
    state = sum(tensor.nbytes for parameter in parameters for tensor in OPTIMIZERS["adamw"](parameter))
    # On this device pixels lie beside the weights before they are joined for the tower.
    pixels = [inputs["pixel_values"] for inputs in batch.image_inputs().values()]
    held = state + sum(tensor.nbytes for tensor in (*parameters, *parameters, *model.buffers(), *pixels))
    measured, resident = peak_bytes(step, torch.device("cpu"), held), found.resident_bytes
    assert measured > 1.5 * resident
    assert found.total_bytes - resident == pytest.approx(measured - resident, rel=TOLERANCE)


def test_what_images_hold_is_told_apart() -> None:
    shape = GroupShape(**SIZES, start=start("llava"))
    full, bounded = (predicted("llava", VARIANTS[name], shape).bytes_by_category for name in ("full", "bounded"))
    pixels = sum(placed.image.read()["pixel_values"].nbytes for placed in start("llava").images)
    assert full[PIXEL_INPUTS] == 2 * pixels
    assert full[VISION_ACTIVATIONS] > 0
    assert IMAGE_FEATURES not in full
    assert bounded[IMAGE_FEATURES] == 2 * start("llava").num_image_tokens * 32 * 4


def test_a_prompt_is_long_enough_for_its_images() -> None:
    with pytest.raises(InputError, match="cannot hold their images, which end at token"):
        GroupShape(prompt_tokens=5, response_tokens=1, num_responses=2, start=start("llava"))
