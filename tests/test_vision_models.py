"""The tiny vision-language models that other tests lean on: they see their pictures, and their processors agree."""

from __future__ import annotations

import pickle

import pytest
import torch
from vision_models import (
    VisionPrompt,
    build_vision_processor,
    naive_vision_logps,
    picture,
    tiny_vision_model,
    vision_groups,
)

NAMES = ("gemma3", "llava", "qwen2_5_vl")


@pytest.mark.parametrize("name", NAMES)
def test_a_response_depends_on_the_picture(name: str) -> None:
    model = tiny_vision_model(name)
    moved = [
        naive_vision_logps(model, vision_groups(name, [VisionPrompt("What?", (picture(seed),), ("A cat", "A dog"))]))
        for seed in (1, 2)
    ]
    assert (moved[0] - moved[1]).abs().min() > 1e-6
    assert (moved[0] - moved[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_images_alone_are_read_as_the_processor_reads_them_together(name: str) -> None:
    made = vision_groups(name)
    sequences = [sequence for group in made.groups for sequence in group.sequences]
    sequence, inputs = next(pair for pair in zip(sequences, made.inputs, strict=True) if len(pair[0].images) == 2)
    for part, whole in inputs.items():
        reads = [image.read().get(part) for image, _ in sequence.images]
        if all(isinstance(one, torch.Tensor) for one in reads):
            assert torch.equal(torch.cat(reads), whole), part


@pytest.mark.parametrize("name", NAMES)
def test_processors_can_be_pickled(name: str) -> None:
    processor = pickle.loads(pickle.dumps(build_vision_processor(name)))
    assert type(processor) is type(build_vision_processor(name))
