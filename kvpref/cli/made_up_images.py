"""Made-up images for `kvpref plan`, through a model's own processor."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kvpref.errors import InputError

if TYPE_CHECKING:
    from kvpref.profiling.prediction.images import PromptStart


def made_up_start(processor: str, count: int, size: str) -> PromptStart:
    """The beginning of a prompt with `count` different images.

    Args:
        processor: Folder or hub name of the processor.
        count: Number of images, at least one.
        size: Width x height in pixels.

    Raises:
        InputError: If the size cannot be read, or there is no processor that makes tokens of images.
    """
    from PIL import Image

    from kvpref.data import load_preferences, load_processor
    from kvpref.profiling.prediction.images import most_images

    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if match is None or count < 1:
        raise InputError(f"--images takes a number and --image-size a size such as 640x480; got {count}, {size!r}")
    width, height = int(match[1]), int(match[2])
    content: list[dict[str, Any]] = [{"type": "image"} for _ in range(count)]
    row = {
        "prompt": [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}],
        "images": [Image.new("RGB", (width, height), (number % 256, 0, 0)) for number in range(count)],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}],
    }
    start = most_images(load_preferences([row], load_processor(processor)))
    if start is None:
        raise InputError(f"{processor}: its processor makes no tokens of images; leave out --images")
    return start
