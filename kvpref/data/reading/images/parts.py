"""Places of images in a conversation: parts of messages, filled from the row's column of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvpref.data.reading.images.values import ImageValue
from kvpref.data.reading.messages import Message, RowError, image_parts, texts_of

IMAGE_PART = {"type": "image"}
"""An image as templates see it; the pixels go to the processor."""

WRITTEN_PLACE = "<image>"
"""How some datasets mark an image's place in a text."""

Messages = tuple[Message, ...]
Turns = str | Messages


def find_images(row: Mapping[str, Any]) -> tuple[ImageValue, ...]:
    """The images in the columns `images` and `image`.

    Raises:
        RowError: If both hold images, or one is null.
    """
    found = [name for name in ("images", "image") if not _is_empty(row.get(name))]
    if len(found) > 1:
        raise RowError("found both `image` and `images`; keep one of the two")
    if not found:
        return ()
    name, value = found[0], row[found[0]]
    if not isinstance(value, list):
        return (ImageValue(value, name),)
    for index, item in enumerate(value):
        if _is_empty(item):
            raise RowError(f"`{name}[{index}]` is null or empty; leave it out, or give the image")
    return tuple(ImageValue(item, f"{name}[{index}]") for index, item in enumerate(value))


def place_images(
    prompt: Turns | None, responses: Sequence[Turns], given: Sequence[ImageValue]
) -> tuple[Turns | None, tuple[ImageValue, ...]]:
    """Give every image of a row its place in the prompt.

    Args:
        prompt: The row's prompt; image parts may hold their own image.
        responses: The row's responses.
        given: The images of its column, in order: for the parts that hold none, or before the text of the first user
            turn if there are no image parts at all.

    Returns:
        The prompt with bare image parts, and the images in the order of the parts. A text prompt is unchanged.

    Raises:
        RowError: If a response holds an image, or images and places differ in number.
    """
    for response in responses:
        if not isinstance(response, str) and any(image_parts(message) for message in response):
            raise RowError("a response holds an image; only prompts may, since responses are what the model writes")
    if prompt is None and given:
        raise RowError("the row has images and no prompt that they belong to; add a `prompt` field")
    if not isinstance(prompt, tuple):
        return prompt, tuple(given)
    places = [part for message in prompt for part in image_parts(message)]
    if not places and given:
        written = sum(text.count(WRITTEN_PLACE) for message in prompt for text in texts_of(message))
        if written == len(given):
            raise RowError(
                f"the texts of the prompt hold {WRITTEN_PLACE!r} for each image, which chat templates take as text; "
                "write content as parts: {'type': 'image'}, {'type': 'text', 'text': ...}"
            )
        return _before_text(prompt, len(given)), tuple(given)
    num_open = sum("image" not in part for part in places)
    if num_open != len(given):
        raise RowError(
            f"the prompt has {num_open} places for images ({{'type': 'image'}}) and the row {len(given)} images "
            "for them; give one image per place"
        )
    waiting = iter(given)
    images, turns = [], []
    for index, message in enumerate(prompt):
        for number, part in enumerate(image_parts(message)):
            name = f"prompt[{index}], image {number}"
            images.append(ImageValue(part["image"], name) if "image" in part else next(waiting))
        turns.append(_with_bare_parts(message))
    return tuple(turns), tuple(images)


def _before_text(prompt: Messages, num_images: int) -> Messages:
    first = next((index for index, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        raise RowError("the row has images, but the prompt has neither places for them nor a user turn")
    content = prompt[first]["content"]
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    turn = prompt[first] | {"content": [*[dict(IMAGE_PART) for _ in range(num_images)], *texts]}
    return (*prompt[:first], turn, *prompt[first + 1 :])


def _with_bare_parts(message: Message) -> Message:
    if not image_parts(message):
        return message
    return message | {"content": [dict(IMAGE_PART) if part["type"] == "image" else part for part in message["content"]]}


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | bytes | list | dict) and not value)
