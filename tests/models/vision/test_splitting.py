"""The pixel inputs of a padded call, taken apart: the images that went in, each where it stood, equal ones found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vision_families import FAMILIES, build_vision_processor
from vision_models import NOT_FOR_THE_TOWER, VisionPrompt, messages, picture, prompts_of_all_kinds, tiny_vision_model

from kvpref import InputError, UnsupportedModelError
from kvpref.models.backbone import backbone
from kvpref.models.vision.splitting import SPLITTERS, split_images
from kvpref.records.images import PlacedImage

KNOWN = sorted(set(FAMILIES) & set(SPLITTERS))


def joined(name: str, prompts: list[VisionPrompt]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """Token ids of the prompts and their pixel inputs, from one call of the processor, as data collators make it."""
    processor = build_vision_processor(name)
    texts = [
        processor.apply_chat_template(messages(prompt), tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    made = processor(
        text=texts, images=[list(prompt.pictures) for prompt in prompts], padding=True, return_tensors="pt"
    )
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(made["input_ids"], made["attention_mask"], strict=True)]
    return rows, {key: value for key, value in made.items() if key not in NOT_FOR_THE_TOWER}


def features(model: Any, inputs: Any) -> torch.Tensor:
    """What the model's own tower makes of pixel inputs, row after row."""
    with torch.no_grad():
        made = backbone(model).get_image_features(**inputs, return_dict=True).pooler_output
    rows = [made] if isinstance(made, torch.Tensor) else list(made)
    return torch.cat([row.flatten(0, -2) for row in rows])


def keys(rows: list[tuple[PlacedImage, ...]]) -> list[list[str]]:
    return [[placed.image.key for placed in row] for row in rows]


@pytest.mark.parametrize("name", KNOWN)
def test_every_piece_has_the_features_that_its_placeholders_get(name: str) -> None:
    model = tiny_vision_model(name).eval()
    rows, inputs = joined(name, prompts_of_all_kinds())
    found = split_images(model, rows, inputs)
    alone = [features(model, placed.image.read()) for row in found for placed in row]
    torch.testing.assert_close(torch.cat(alone), features(model, inputs), rtol=1e-5, atol=1e-5)
    sizes = [placed.image.num_tokens for row in found for placed in row]
    assert [len(rows_of_image) for rows_of_image in alone] == sizes
    token_id = model.config.image_token_id
    for ids, images in zip(rows, found, strict=True):
        held = [place for placed in images for first, stop in placed.runs for place in range(first, stop)]
        assert held == [place for place, token in enumerate(ids) if token == token_id]
    one, none, two, again = keys(found)
    assert one
    assert one == again
    assert not none
    assert len(two) >= len(one)
    assert not set(one) & set(two)


@pytest.mark.parametrize("name", KNOWN)
def test_one_other_pixel_is_another_image(name: str) -> None:
    model = tiny_vision_model(name)
    rows, inputs = joined(name, [VisionPrompt("Who?", (picture(4),), ()) for _ in range(3)])
    one, two, three = keys(split_images(model, rows, inputs))
    assert one == two == three
    changed = inputs["pixel_values"].clone()
    changed.view(-1)[-1] += 0.5  # of the last image
    one, two, three = keys(split_images(model, rows, {**inputs, "pixel_values": changed}))
    assert one == two
    assert len(three) == len(two)
    assert one != three


@pytest.mark.parametrize("name", KNOWN)
def test_inputs_that_do_not_belong_to_the_rows_are_refused(name: str) -> None:
    model = tiny_vision_model(name)
    rows, inputs = joined(name, prompts_of_all_kinds())
    last = max(place for place, token in enumerate(rows[2]) if token == model.config.image_token_id)
    cut = [*rows[:2], rows[2][:last], rows[3]]
    with pytest.raises(InputError, match="Image features and image tokens do not match"):
        split_images(model, cut, inputs)
    with pytest.raises(InputError, match="Image features and image tokens do not match"):
        split_images(model, rows[:3], inputs)


def test_a_family_that_nobody_has_checked_is_refused() -> None:
    model = tiny_vision_model("llava")
    model.config.model_type = "unheard_of"
    with pytest.raises(UnsupportedModelError, match="unheard_of"):
        split_images(model, [[1, 2]], {})
