"""Which models can take images."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from kvpref.errors import UnsupportedModelError
from kvpref.models.support import SAFE_FALLBACK
from kvpref.models.vision.families import VISION, WITHOUT_IMAGES
from kvpref.models.vision.tower import has_tower
from kvpref.records.images import Image


def check_images(model: PreTrainedModel, images: Sequence[Image]) -> None:
    """Check that a model is known to be exact with images.

    Args:
        model: An unwrapped model.
        images: The images, at least one.

    Raises:
        UnsupportedModelError: If it is not.
    """
    name = model.config.model_type
    if not has_tower(model):
        raise UnsupportedModelError(
            f"the batch holds {len(images)} images, and {type(model).__name__} reads none; load a vision-language "
            "model (AutoModelForImageTextToText), or leave the images out"
        )
    if name in WITHOUT_IMAGES:
        raise UnsupportedModelError(
            f"model type {name!r} is exact on text, but not with images: {WITHOUT_IMAGES[name]}; {SAFE_FALLBACK}"
        )
    if name not in VISION:
        raise UnsupportedModelError(
            f"model type {name!r} is not among those known to be exact with images: {', '.join(sorted(VISION))}"
        )
    for part, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise UnsupportedModelError(
                f"{part} normalises over all images of a batch while it trains, so features of an image depend on the "
                "others; call .eval() on the tower"
            )
