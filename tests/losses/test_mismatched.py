"""Mismatched responses follow a group's whole prompt, images included."""

from __future__ import annotations

import pytest

from kvpref.errors import InputError
from kvpref.losses.mismatched import add_mismatched, mismatched_flags
from kvpref.records.groups import Group, Sequence
from kvpref.records.images import Image, PlacedImage

IMAGES = {key: Image(key=key, token_id=9, num_tokens=2, read=dict) for key in "ab"}


def asked(key: str, *responses: int) -> Group:
    placed = (PlacedImage(IMAGES[key], ((1, 3),)),)
    return Group([Sequence([1, 9, 9, 2, response], [False] * 4 + [True], placed) for response in responses])


def test_the_prompts_images_stand_before_mismatched_responses():
    groups = list(add_mismatched([asked("a", 5, 6), asked("b", 7, 8)], 1))
    for group, key, response in zip(groups, "ab", (7, 6), strict=True):
        assert mismatched_flags(group) == [False, False, True]
        added = group.sequences[2]
        assert added.input_ids == (1, 9, 9, 2, response)
        assert added.images == group.sequences[0].images
        assert [image.key for image, _ in added.images] == [key]


def test_one_question_about_different_images_is_different_prompts():
    with pytest.raises(InputError, match="expected 1 groups with another prompt, found 0 among 2"):
        list(add_mismatched([asked("a", 5), asked("a", 6)], 1))
