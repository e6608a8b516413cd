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


def test_weights_and_earlier_parts_go_along():
    """A template that writes an earlier turn anew (7 becomes 70) gives a response two parts, here and there."""
    earlier = Sequence([1, 2, 7, 8], [False, False, True, True], weights=[0.5, 2.0])
    response = Sequence([1, 2, 70, 3, 9], [False] * 4 + [True], weights=[0.25], earlier=[earlier])
    plain = Sequence([1, 4, 4, 5], [False] * 3 + [True])
    groups = list(add_mismatched([Group([plain], id="file:1"), Group([response], id="file:2")], 1))
    found = groups[0].sequences[1]
    assert [part.input_ids for part in found.parts] == [(1, 4, 4, 7, 8), (1, 4, 4, 70, 3, 9)]
    assert [part.scored.index(True) for part in found.parts] == [3, 5]
    assert [part.weights for part in found.parts] == [(0.5, 2.0), (0.25,)]
    assert found.total_scored == 3


def test_a_prompt_that_is_written_anew_is_refused():
    earlier = Sequence([1, 2, 7], [False, False, True])
    response = Sequence([1, 3, 7, 3, 9], [False] * 4 + [True], earlier=[earlier])
    plain = Sequence([1, 4, 4, 5], [False] * 3 + [True])
    with pytest.raises(InputError, match="file:1: no mismatched response can be made of one whose prompt"):
        list(add_mismatched([Group([plain], id="file:1"), Group([response], id="file:2")], 1))
