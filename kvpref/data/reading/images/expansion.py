"""Texts with the placeholders that a model's processor writes for images of given sizes.

The processor's own code does it: a copy of it is called for every text, with blank images of the right sizes, which its
image processor prepares once per size. What it passes to its tokenizer is the text we want.
Placeholders depend only on sizes; pixels are prepared when a batch is collated, by `kvpref.data.reading.images.tower`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from kvpref.data.reading.messages import RowError
from kvpref.errors import InputError

Size = tuple[int, int]
"""Width and height."""

PROBE_SIZE = (448, 448)
"""Large enough that any processor writes more placeholders than other tokens for it."""


def reads_images(given: Any) -> bool:
    """Whether this is a processor that reads images, not a tokenizer."""
    return getattr(given, "image_processor", None) is not None and getattr(given, "tokenizer", None) is not None


class PlaceholderWriter:
    """Writes placeholders by calling one processor.

    Args:
        processor: The model's processor, with `image_processor`, `tokenizer` and `image_token`.

    Attributes:
        image_token: Stands for one image in a text passed to the processor.
        token_id: The placeholder's token id, one per row of features.

    Raises:
        InputError: If it writes no placeholders.
    """

    def __init__(self, processor: Any) -> None:
        self.image_token: str = getattr(processor, "image_token", None) or "<image>"
        self._recorder = _Recorder(processor.tokenizer)
        self._processor = copy.copy(processor)
        self._processor.image_processor = _remembering(processor.image_processor)
        self._processor.tokenizer = self._recorder
        self._counts: dict[tuple[Size, ...], int] = {}
        self._joint: dict[tuple[Size, ...], bool] = {}
        self.token_id = self._find_token_id(processor)
        # Some processors end the prompt themselves (PaliGemma writes a line break), unaware of a response.
        self._ends_prompts = not self.write(f"{self.image_token}a", [PROBE_SIZE]).endswith("a")

    def write(self, text: str, sizes: Sequence[Size]) -> str:
        """The text with an image's placeholders at each `image_token`.

        Raises:
            RowError: If the processor refuses it.
        """
        found = text.count(self.image_token)
        if found != len(sizes):
            raise RowError(
                f"the prompt has {len(sizes)} images and its text {found} times {self.image_token!r}, which stands for "
                "one; write images as parts of messages ({'type': 'image'}), nowhere in a text or a response"
            )
        self._call(text, sizes)
        return self._recorder.text

    def write_prompt(self, prompt: str, response: str, sizes: Sequence[Size]) -> str:
        """A prompt with placeholders, as the processor writes it before a response.

        Raises:
            RowError: If the processor refuses them, or changes the response.
        """
        if self._ends_prompts:
            return self.write(prompt, sizes)
        whole = self.write(prompt + response, sizes)
        if not whole.endswith(response):
            raise RowError("the model's processor changes the text of the response where images are in the prompt")
        return whole[: len(whole) - len(response)]

    def count(self, sizes: tuple[Size, ...]) -> int:
        """Number of placeholders for images passed to the processor together, without other text."""
        if sizes not in self._counts:
            ids = self._call(self.image_token * len(sizes), sizes)["input_ids"][0]
            self._counts[sizes] = [int(token) for token in ids].count(self.token_id)
        return self._counts[sizes]

    def treats_together(self, sizes: tuple[Size, ...]) -> bool:
        """Whether the images of a prompt are processed differently together than each alone."""
        if len(sizes) < 2:
            return False
        if sizes not in self._joint:
            counts_images = "batch_num_images" in self._call(self.image_token * len(sizes), sizes)
            alone = sum(self.count((size,)) for size in sizes)
            self._joint[sizes] = counts_images or alone != self.count(sizes)
        return self._joint[sizes]

    def _call(self, text: str, sizes: Sequence[Size]) -> Any:
        try:
            return self._processor(text=[text], images=[[_blank(size) for size in sizes]])
        except Exception as error:  # processors raise errors of many classes, such as for sizes that they cannot cut
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            shown = ", ".join(f"{width}x{height}" for width, height in sizes)
            raise RowError(f"the model's processor refuses the images ({shown}): {reason}") from error

    def _find_token_id(self, processor: Any) -> int:
        tokenizer = processor.tokenizer
        # Some processors take one token in texts and repeat another.
        candidates = [
            tokenizer.convert_tokens_to_ids(getattr(processor, "img_patch_token", None) or self.image_token),
            getattr(tokenizer, "image_token_id", None),
            getattr(processor, "image_token_id", None),
            tokenizer.convert_tokens_to_ids(self.image_token),
        ]
        if getattr(processor, "img_patch_token", None) is None:
            candidates = candidates[1:]
        name = type(processor).__name__
        try:
            ids = [int(token) for token in self._call(self.image_token, [PROBE_SIZE])["input_ids"][0]]
        except RowError as error:
            raise InputError(f"{name}: {error}; images with this processor are not supported") from error
        self._check_text(ids, name)
        counts = {token: ids.count(token) for token in candidates if token is not None}
        best = max(counts, key=lambda token: counts[token], default=None)
        if best is None or not counts[best]:
            raise InputError(f"{name} writes no placeholders for images; images with this processor are not supported")
        return int(best)

    def _check_text(self, ids: list[int], name: str) -> None:
        """Refuse a processor that does not make its tokens from a single text."""
        tokenizer, text = self._recorder.tokenizer, self._recorder.text
        if ids not in (tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]):
            raise InputError(f"{name} makes tokens in a way of its own; images with this processor are not supported")


def _blank(size: Size) -> Any:
    from PIL import Image

    return Image.new("RGB", size)


class _Recorder:
    """A tokenizer that remembers the text it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text = ""

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        return self.tokenizer(text, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _remembering(image_processor: Any) -> Any:
    """A copy of an image processor that prepares images once per size, and keeps the shapes of what is large."""
    seen: dict[Any, dict[str, Any]] = {}

    def call(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        key = (_sizes(images), args, repr(sorted(kwargs.items())))
        if key not in seen:
            seen[key] = {name: _shrunk(value) for name, value in cls.__call__(self, images, *args, **kwargs).items()}
        from transformers import BatchFeature

        return BatchFeature(
            {name: list(value) if isinstance(value, list) else value for name, value in seen[key].items()}
        )

    cls = type(image_processor)
    kind = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
    copied = copy.copy(image_processor)
    copied.__class__ = kind
    return copied


def _sizes(images: Any) -> Any:
    return tuple(map(_sizes, images)) if isinstance(images, list | tuple) else images.size


def _shrunk(value: Any) -> Any:
    """Large arrays as a single number expanded to their shape, which is all that processors look at."""
    import numpy
    import torch

    if isinstance(value, list | tuple):
        return type(value)(map(_shrunk, value))
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 256:
        return value.new_zeros(()).expand(value.shape)
    if isinstance(value, numpy.ndarray) and value.dtype.kind == "f" and value.size > 256:
        return numpy.broadcast_to(numpy.zeros((), value.dtype), value.shape)
    return value
