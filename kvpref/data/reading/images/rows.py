"""The images of rows: checked, stored, written into the texts, and located among the tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvpref.data.reading.images.decoding import scaled_size
from kvpref.data.reading.images.expansion import PlaceholderWriter, Size
from kvpref.data.reading.images.store import ImageStore, StoredImage
from kvpref.data.reading.images.tower import ReadImages, TowerInputs
from kvpref.data.reading.messages import RowError
from kvpref.data.reading.rendering import RenderedRow
from kvpref.records.images import Image, PlacedImage, runs_of


class RowImages:
    """The images of one dataset, for one processor.

    Args:
        processor: The model's processor.
        folder: The base of relative paths.
        max_pixels: Larger images are scaled down; None leaves scaling to the processor.
    """

    def __init__(self, processor: Any, folder: Path, max_pixels: int | None) -> None:
        self._processor = processor
        self._store = ImageStore(folder)
        self._max_pixels = max_pixels
        self._writer: PlaceholderWriter | None = None
        self._inputs: TowerInputs | None = None
        self._settings = ""
        self._known: dict[str, Image] = {}
        self._scaled: set[str] = set()
        tokens = (getattr(processor, "image_token", None), getattr(processor.tokenizer, "image_token", None))
        self._marks = {token for token in tokens if token}

    @property
    def num_scaled(self) -> int:
        """Images that had more pixels than the limit."""
        return len(self._scaled)

    def write(self, row: RenderedRow) -> RenderedRow:
        """Check the images of a row, and write their placeholders into its texts.

        Raises:
            RowError: If an image cannot be used, or the processor refuses it or the texts.
            InputError: If the processor writes no placeholders.
        """
        if not row.row.images:
            for mark in self._marks:
                if any(mark in text for text in row.texts):
                    raise RowError(f"a text holds {mark!r}, which stands for an image, and the row has no image for it")
            return row
        images = tuple(map(self._store.add, row.row.images))
        assert row.spans is not None  # a row with images has a prompt
        writer = self._prepared()
        sizes = self._sizes(images)
        texts, spans, written = [], [], {}
        for text, own in zip(row.texts, row.spans, strict=True):
            start = own[0][0]
            prompt, rest = text[:start], text[start:]
            # The text right after an image may change how the processor writes it.
            if prompt not in written or writer.image_token in rest or prompt.endswith(writer.image_token):
                written[prompt] = writer.write_prompt(prompt, rest, sizes)
            longer = len(written[prompt]) - len(prompt)
            texts.append(written[prompt] + rest)
            spans.append(tuple((begin + longer, end + longer) for begin, end in own))
        # The row may hold the bytes of its images, which are stored already.
        bare = replace(row.row, images=())
        return replace(row, row=bare, texts=tuple(texts), spans=tuple(spans), images=images)

    def place(
        self, images: tuple[StoredImage, ...], input_ids: Sequence[int], num_prompt: int
    ) -> tuple[PlacedImage, ...]:
        """Find images among the tokens of a prompt and its response.

        Args:
            images: The images of the row.
            input_ids: Token ids of the whole sequence.
            num_prompt: How many of them belong to the prompt.

        Raises:
            RowError: If the number of placeholders does not match the images.
        """
        if not images:
            return ()
        units = self._units(images)
        token_id = self._prepared().token_id
        places = [index for index, token in enumerate(input_ids) if token == token_id]
        expected = sum(unit.num_tokens for unit in units)
        if len(places) != expected or places[-1] >= num_prompt:
            raise RowError(
                f"the tokens hold {len(places)} placeholders for images, and the {len(images)} images of the row need "
                f"{expected} in the prompt; write images as parts of messages, nowhere in a text"
            )
        placed = []
        for unit in units:
            placed.append(PlacedImage(unit, runs_of(places[: unit.num_tokens])))
            places = places[unit.num_tokens :]
        return tuple(placed)

    def _units(self, images: tuple[StoredImage, ...]) -> list[Image]:
        if self._prepared().treats_together(self._sizes(images)):
            return [self._image(images)]
        return [self._image((image,)) for image in images]

    def _image(self, images: tuple[StoredImage, ...]) -> Image:
        writer = self._prepared()
        assert self._inputs is not None
        parts = "|".join((self._settings, *(image.digest for image in images)))
        key = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
        if key not in self._known:
            num_tokens = writer.count(self._sizes(images))
            if not num_tokens:
                raise RowError("the model's processor writes no placeholder for the image")
            read = ReadImages(key, images, num_tokens, self._inputs)
            self._known[key] = Image(key=key, token_id=writer.token_id, num_tokens=num_tokens, read=read)
        return self._known[key]

    def _prepared(self) -> PlaceholderWriter:
        if self._writer is None:
            self._writer = PlaceholderWriter(self._processor)
            self._inputs = TowerInputs(
                self._processor, self._writer.image_token, self._writer.token_id, self._max_pixels
            )
            self._settings = self._inputs.settings_digest()
        return self._writer

    def _sizes(self, images: Sequence[StoredImage]) -> tuple[Size, ...]:
        sizes = tuple(scaled_size(image.size, self._max_pixels) for image in images)
        self._scaled.update(image.digest for image, size in zip(images, sizes, strict=True) if size != image.size)
        return sizes
