"""Pixel inputs in page-locked memory: each image once, however many micro-batches show it."""

from __future__ import annotations

import pytest
import torch
from vision_models import VisionPrompt, picture, vision_groups

import kvpref
from kvpref.engine.options import EngineOptions
from kvpref.training.loading.inputs import MicroBatchInputs, StepInputs, join_micro_batches


def test_images_of_a_step_are_pinned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    prompts = [VisionPrompt(text, (picture(1),), ("Red", "Blue.")) for text in ("What?", "Which?", "Why?")]
    batches = [kvpref.collate([group]) for group in vision_groups("llava", prompts).groups]
    for batch in batches:
        batch.image_inputs()
    options = EngineOptions(schedule="bounded", max_tokens_per_chunk=16)
    inputs = StepInputs(
        micro_batches=tuple(
            MicroBatchInputs(batch=batch, group_indices=(index,), is_filler=False)
            for index, batch in enumerate(batches)
        ),
        joined=join_micro_batches(batches, options, shares=True),
    ).pin_memory()
    (image,) = batches[0].images
    pixels = batches[0].image_inputs()[image.key]["pixel_values"]
    assert sum(tensor.shape == pixels.shape for tensor in pinned) == 1
    (step,) = inputs.joined
    every = [*step.batches, *(item.batch for item in inputs)]
    assert len({id(batch.image_inputs()[image.key]["pixel_values"]) for batch in every}) == 1
    assert torch.equal(every[0].image_inputs()[image.key]["pixel_values"], pixels)
