"""Placeholders are asked of the processor itself, which prepares blank images, once per size."""

from __future__ import annotations

import pytest
from image_processors import build_processor
from transformers import Qwen2VLImageProcessorPil

from kvpref.data.reading.images.expansion import PlaceholderWriter, reads_images
from kvpref.data.reading.messages import RowError
from kvpref.errors import InputError


@pytest.fixture
def calls(monkeypatch):
    """The sizes of all images that the processor's own image processor is given."""
    seen = []
    own = Qwen2VLImageProcessorPil.preprocess

    def preprocess(self, images, *args, **kwargs):
        seen.append(images)
        return own(self, images, *args, **kwargs)

    monkeypatch.setattr(Qwen2VLImageProcessorPil, "preprocess", preprocess)
    return seen


def test_each_size_is_prepared_once(calls):
    processor = build_processor("qwen2_5_vl")
    before = vars(processor) | {}
    writer = PlaceholderWriter(processor)
    calls.clear()
    for number in range(5):
        text = writer.write(f"{number}<|image_pad|>?", [(40, 32)])
        assert text == f"{number}{'<|image_pad|>' * 4}?"
    assert writer.count(((64, 32),)) == 8
    assert writer.count(((40, 32), (64, 32))) == 12
    assert len(calls) == 3, "of one size, the other, and both together"
    assert vars(processor) == before, "the processor given is not touched"


def test_what_is_remembered_of_large_arrays_is_their_shape():
    writer = PlaceholderWriter(build_processor("qwen2_5_vl"))
    made = writer._call("<|image_pad|>", [(64, 64)])
    assert made["pixel_values"].shape == (64, 384)
    assert made["pixel_values"].base.nbytes == 4
    assert made["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_prompts_that_the_processor_ends_go_on_with_the_response():
    writer = PlaceholderWriter(build_processor("paligemma"))
    assert writer.write_prompt("<image>What?", " yes", [(40, 32)]) == f"{'<image>' * 4}<s>What?\n"


def test_token_ids_of_placeholders_are_those_that_are_repeated():
    for name, token in (
        ("gemma3", "<image_soft_token>"),
        ("aya_vision", "<|IMG_PATCH|>"),
        ("internvl", "<IMG_CONTEXT>"),
    ):
        processor = build_processor(name)
        assert PlaceholderWriter(processor).token_id == processor.tokenizer.convert_tokens_to_ids(token)


@pytest.mark.parametrize(("name", "together"), [("llava_onevision", True), ("llava_next", False), ("idefics3", False)])
def test_images_are_together_only_where_their_number_matters(name, together):
    sizes = ((40, 32), (64, 32))
    writer = PlaceholderWriter(build_processor(name))
    assert (writer.treats_together(sizes), writer.treats_together(sizes[:1])) == (together, False)


def test_refusals():
    processor = build_processor("qwen2_5_vl")
    with pytest.raises(RowError, match="2 images and its text 1 times"):
        PlaceholderWriter(processor).write("<|image_pad|>", [(40, 32), (40, 32)])
    with pytest.raises(RowError, match=r"refuses the images \(4000x4\): absolute aspect ratio"):
        PlaceholderWriter(processor).write("<|image_pad|>", [(4000, 4)])
    processor.tokenizer = _Doubling(processor.tokenizer)
    with pytest.raises(InputError, match="Qwen2_5_VLProcessor"):
        PlaceholderWriter(processor)
    assert not reads_images(processor.tokenizer)


class _Doubling:
    """A tokenizer whose tokens depend on who calls it."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, **kwargs):
        made = self._tokenizer(text, **kwargs)
        if isinstance(text, list):
            made["input_ids"] = [[0, *ids] for ids in made["input_ids"]]
        return made
