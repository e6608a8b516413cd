"""Columns of images fill the places in the messages, in order."""

from __future__ import annotations

import pytest

from kvpref.data.reading.messages import RowError
from kvpref.data.reading.rows import parse_row

HOLE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}
PAIR = {"chosen": "A", "rejected": "B"}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def parsed(prompt, **columns):
    row = parse_row({"prompt": prompt, **PAIR, **columns})
    return row.prompt, [image.value for image in row.images]


def test_places_are_filled_in_order_and_hold_their_own():
    prompt = [
        user(HOLE, TEXT, {"type": "image", "path": "own.png"}),
        {"role": "assistant", "content": "A"},
        user({"type": "image_url", "image_url": {"url": "data:,"}}, HOLE),
    ]
    turns, images = parsed(prompt, images=["a.png", "b.png"])
    assert images == ["a.png", "own.png", {"url": "data:,"}, "b.png"]
    assert turns == (user(HOLE, TEXT, HOLE), prompt[1], user(HOLE, HOLE))


@pytest.mark.parametrize("content", ["What?", [TEXT]])
def test_without_places_images_stand_before_the_text_of_the_first_user_turn(content):
    system = {"role": "system", "content": "S"}
    turns, images = parsed([system, {"role": "user", "content": content}], image="a.png")
    assert (turns, images) == ((system, user(HOLE, TEXT)), ["a.png"])


def test_text_prompts_keep_their_images_beside_them():
    assert parsed("What?", images=["a", "b"]) == ("What?", ["a", "b"])
    assert parsed("What?", images=[], image=None) == ("What?", [])


def test_a_shared_beginning_with_images_is_the_prompt():
    start = [user(HOLE, TEXT)]
    row = parse_row(
        {name: [*start, {"role": "assistant", "content": text}] for name, text in PAIR.items()} | {"image": "a.png"}
    )
    assert (row.prompt, len(row.images)) == (tuple(start), 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [user(HOLE, HOLE)], "images": ["a"]}, "2 places for images.* and the row 1 images"),
        ({"prompt": [user(HOLE)], "images": ["a", "b"]}, "1 places for images.* and the row 2 images"),
        ({"prompt": [user(HOLE, TEXT)]}, "1 places for images.* and the row 0 images"),
        ({"prompt": "q", "images": ["a"], "image": "b"}, "both `image` and `images`"),
        ({"prompt": "q", "images": ["a", None]}, r"`images\[1\]` is null"),
        ({"images": ["a"]}, "images and no prompt"),
        (
            {"prompt": [{"role": "user", "content": "<image>\nq"}], "image": "a"},
            "hold '<image>' for each image.*as parts",
        ),
        ({"prompt": "q", "chosen": [{"role": "assistant", "content": [HOLE]}]}, "a response holds an image"),
        (
            {"prompt": [{"role": "system", "content": "s"}], "image": "a"},
            "neither places for them nor a user turn",
        ),
        ({"prompt": [user({"type": "video"})]}, "a part of type 'video'; only text and images"),
        ({"prompt": [user({"type": "image", "path": "a", "url": "b"})]}, "holds several images: url, path"),
        ({"prompt": [user({"type": "image_url"})]}, "has no address"),
        ({"prompt": "q", "video": "a.mp4"}, "`video` is not empty, and video and audio are not supported"),
    ],
)
def test_what_does_not_fit(row, reason):
    row = PAIR | row
    if isinstance(row["chosen"], list):
        row["rejected"] = [{"role": "assistant", "content": "B"}]
    with pytest.raises(RowError, match=reason):
        parse_row(row)
