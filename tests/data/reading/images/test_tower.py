"""Tower inputs are made from the file when asked for, kept for a moment, and never with the data set."""

from __future__ import annotations

import pickle

import pytest
import torch
from image_processors import build_processor
from vision_models import picture

from kvpref.data import load_preferences
from kvpref.data.reading.images import store, tower


@pytest.fixture
def images(tmp_path):
    """Three images of a file each."""
    rows = []
    for seed in range(3):
        picture(seed).save(tmp_path / f"{seed}.png")
        prompt = [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / f"{seed}.png")}]}]
        rows.append({"prompt": prompt, "chosen": "A", "rejected": "B"})
    return load_preferences(rows, build_processor("gemma3")).images


@pytest.fixture
def decoded(monkeypatch):
    seen = []
    own = store.decode
    monkeypatch.setattr(store, "decode", lambda content: seen.append(content) or own(content))
    return seen


def num_kept(image):
    return sum(value.nbytes for made in image.read.inputs._kept.values() for value in made.values())


def test_nothing_is_made_before_it_is_read_and_repeated_reads_decode_once(images, decoded):
    assert num_kept(images[0]) == 0
    first, again = images[0].read(), images[0].read()
    assert len(decoded) == 1
    assert first["pixel_values"] is again["pixel_values"]
    again["other"] = torch.zeros(1)
    assert set(images[0].read()) == {"pixel_values"}


def test_no_more_is_kept_than_the_limit(images, decoded, monkeypatch):
    one = images[0].read()["pixel_values"].nbytes
    monkeypatch.setattr(tower, "MAX_BYTES_KEPT", 2 * one)
    for image in images:
        image.read()
    assert num_kept(images[0]) == 2 * one
    decoded.clear()
    images[2].read()
    images[0].read()
    assert len(decoded) == 1, "the one read longest ago was dropped"


def test_what_is_kept_does_not_travel(images):
    images[0].read()
    copy = pickle.loads(pickle.dumps(images[0]))
    assert num_kept(copy) == 0
    assert torch.equal(copy.read()["pixel_values"], images[0].read()["pixel_values"])


def test_only_settings_that_change_images_change_their_keys():
    processor = build_processor("gemma3")
    inputs = tower.TowerInputs(processor, "<start_of_image>", 0, None)
    digest = inputs.settings_digest()
    processor.chat_template = "other"
    processor.image_processor.device = "cpu"
    assert inputs.settings_digest() == digest
    assert tower.TowerInputs(processor, "<start_of_image>", 0, 100).settings_digest() != digest
    processor.image_processor.size = {"height": 64, "width": 64}
    assert inputs.settings_digest() != digest
