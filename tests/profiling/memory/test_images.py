"""What images hold: once per group where prompts are shared, once per response otherwise; counted in bytes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from vision_models import VisionPrompt, picture, tiny_vision_model, vision_groups

import kvpref
from kvpref.engine.options import EngineOptions
from kvpref.profiling.memory.loss import weighted_likelihood
from kvpref.profiling.memory.profile import MemoryProfile, profile_step
from kvpref.profiling.memory.step import MemoryCase, ProfiledStep
from kvpref.profiling.memory.tracker import (
    IMAGE_FEATURE_GRADIENTS,
    IMAGE_FEATURES,
    PIXEL_INPUTS,
    VISION_ACTIVATIONS,
)
from kvpref.profiling.step_time.step import TimedStep, profile_time

WORDS = ("Red", "blue", "Green.", "yellow", "White", "black.", "Orange", "purple")


def groups(num_responses: int) -> list[kvpref.Group]:
    """One prompt with two images of equal size."""
    prompt = VisionPrompt("Which colour?", (picture(1), picture(2)), WORDS[:num_responses])
    return vision_groups("llava", [prompt]).groups


@cache
def profiled(variant: str, num_responses: int, limit: int = 4096) -> MemoryProfile:
    model = kvpref.attach(tiny_vision_model("llava"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    case = MemoryCase(variant=variant, cut=[groups(num_responses)], max_tokens_per_chunk=limit)
    return profile_step(ProfiledStep(model, weighted_likelihood, optimizer, case))


def held(variant: str, num_responses: int, category: str, limit: int = 4096) -> int:
    """The most bytes of a category, over the whole step."""
    timeline = profiled(variant, num_responses, limit).timeline
    return max(point.bytes_by_category.get(category, 0) for point in timeline)


def pixels_of(num_responses: int) -> int:
    image = groups(num_responses)[0].sequences[0].images[0].image
    return int(image.read()["pixel_values"].nbytes)


@pytest.mark.parametrize("variant", ["full", "one_pass", "bounded"])
def test_pixels_and_tower_do_not_grow_with_the_responses(variant: str) -> None:
    for category in (PIXEL_INPUTS, VISION_ACTIVATIONS):
        assert held(variant, 2, category) == held(variant, 8, category) > 0
    assert held(variant, 8, PIXEL_INPUTS) == 2 * pixels_of(8)


@pytest.mark.parametrize("variant", ["packed", "padded"])
@pytest.mark.parametrize("num_responses", [2, 8])
def test_otherwise_there_is_one_per_response(variant: str, num_responses: int) -> None:
    assert held(variant, num_responses, PIXEL_INPUTS) == num_responses * held("full", 8, PIXEL_INPUTS)
    # Some results of the tower's do not grow with images: embedded positions.
    once = held("full", 8, VISION_ACTIVATIONS)
    assert 0.9 * num_responses * once < held(variant, num_responses, VISION_ACTIVATIONS) <= num_responses * once


def test_bounded_holds_a_table_and_the_tower_of_some_images() -> None:
    """With a bound of one image at a time."""
    (image, _), _ = groups(2)[0].sequences[0].images
    for limit, share in ((4096, 1.0), (image.num_tokens, 0.6)):
        table = 2 * image.num_tokens * 32 * 4  # (R, hidden_size) in float32
        assert held("bounded", 8, IMAGE_FEATURES, limit) == held("bounded", 8, IMAGE_FEATURE_GRADIENTS, limit) == table
        assert held("bounded", 8, VISION_ACTIVATIONS, limit) <= share * held("full", 8, VISION_ACTIVATIONS)


def test_a_peak_is_the_sum_of_its_parts() -> None:
    found = profiled("full", 8)
    assert sum(found.peak.bytes_by_category.values()) == found.peak.total_bytes
    assert found.peak.bytes_by_category[VISION_ACTIVATIONS] > 0
    assert found.tracked_bytes == pytest.approx(found.allocated_bytes, rel=0.02)


def test_the_tower_is_a_stage_of_the_time() -> None:
    model = kvpref.attach(tiny_vision_model("llava"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for options in (EngineOptions(), EngineOptions(schedule="bounded", max_tokens_per_chunk=16)):
        step = TimedStep(model, kvpref.losses.as_loss(weighted_likelihood), optimizer, [groups(2)], options)
        profile = profile_time(step, 1)
        phases = ("forward", "backward", *(["recompute"] if options.schedule == "bounded" else []))
        for phase in phases:
            assert profile.ms(stage="vision tower", phase=phase, part="linear") > 0
        stages = list(dict.fromkeys(entry.place.stage for entry in profile.entries))
        assert stages[:2] == ["vision tower", "pass 0"]
