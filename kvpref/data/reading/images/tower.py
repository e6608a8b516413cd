"""The tower's inputs of an image, made by the model's processor when a batch is collated."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpref.data.reading.images.decoding import scale
from kvpref.data.reading.images.store import StoredImage
from kvpref.errors import RunError

if TYPE_CHECKING:
    import torch

MAX_BYTES_KEPT = 64 << 20
"""Bytes kept of the most recently read images: enough for a prompt in several micro-batches of a step."""

# Outputs for the text, which is passed only because of the images.
_OF_TEXT = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "cross_attention_mask"}
)

# Settings of where and how an image processor runs, not of what it makes.
_OF_THE_MACHINE = frozenset({"device", "disable_grouping", "data_format", "input_data_format", "return_tensors"})


class TowerInputs:
    """Makes tower inputs with one processor.

    Args:
        processor: The model's processor.
        image_token: Stands for one image in a text.
        token_id: The placeholder's token id.
        max_pixels: Larger images are scaled down before the processor sees them.
    """

    def __init__(self, processor: Any, image_token: str, token_id: int, max_pixels: int | None) -> None:
        self.processor = processor
        self.image_token = image_token
        self.token_id = token_id
        self.max_pixels = max_pixels
        self._clear()

    def _clear(self) -> None:
        self._kept: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()  # steps are collated ahead in a thread

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_kept", "_num_bytes", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def settings_digest(self) -> str:
        """Digest of everything that affects how an image is processed."""
        image_processor = self.processor.image_processor
        own: dict[str, Any] = {
            name: value for name, value in vars(self.processor).items() if isinstance(value, int | float | str | bool)
        }
        own.pop("chat_template", None)
        own["images_kwargs"] = getattr(self.processor, "images_kwargs", None)
        of_images = {name: value for name, value in image_processor.to_dict().items() if name not in _OF_THE_MACHINE}
        settings = [type(self.processor).__name__, own, of_images, self.max_pixels]
        return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

    def make(self, key: str, images: tuple[StoredImage, ...], num_tokens: int) -> Mapping[str, torch.Tensor]:
        """Read and process images, or return the cached result.

        Raises:
            RunError: If an image's file is gone or changed, or the processor writes other placeholders for it.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return dict(self._kept[key])
        made = self._process(images, num_tokens)
        size = sum(value.nbytes for value in made.values())
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._num_bytes += size
            while self._num_bytes > MAX_BYTES_KEPT:
                self._num_bytes -= sum(value.nbytes for value in self._kept.popitem(last=False)[1].values())
        return dict(made)

    def _process(self, images: tuple[StoredImage, ...], num_tokens: int) -> dict[str, torch.Tensor]:
        import torch

        pictures = [scale(image.read(), self.max_pixels) for image in images]
        text = self.image_token * len(pictures)
        made = self.processor(text=[text], images=[pictures], return_tensors="pt")
        found = int((made["input_ids"] == self.token_id).sum())
        if found != num_tokens:
            sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in pictures)
            raise RunError(
                f"the processor writes {found} placeholders for an image ({sizes}) that had {num_tokens} when the data "
                "was read; its settings changed in between"
            )
        tensors = {name: value for name, value in made.items() if name not in _OF_TEXT}
        return {name: value if torch.is_tensor(value) else torch.as_tensor(value) for name, value in tensors.items()}


@dataclass(frozen=True)
class ReadImages:
    """Reads the images of one `kvpref.Image`; small, and picklable with the processor, which all share.

    Args:
        key: The image's key.
        images: One image, or those that the processor treats together.
        num_tokens: Number of their placeholders.
        inputs: Makes the tensors.
    """

    key: str
    images: tuple[StoredImage, ...]
    num_tokens: int
    inputs: TowerInputs

    def __call__(self) -> Mapping[str, torch.Tensor]:
        return self.inputs.make(self.key, self.images, self.num_tokens)
