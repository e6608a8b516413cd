"""Made-up prompts with pictures for `kvpref check --numeric` on models that see images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpref.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpref import Group

_SIZES = ((96, 64), (64, 112))


def picture_groups(source: str | None, model: PreTrainedModel) -> list[Group]:
    """A group with one picture, one with another size, and one without; empty for models that take no images.

    Args:
        source: Where the model's processor is; None if there is none.
        model: The model of the processor.

    Raises:
        InputError: If the processor cannot be loaded.
    """
    from kvpref.cli.loading import load_matching_processor
    from kvpref.data import load_preferences
    from kvpref.models.classes import sees_images
    from kvpref.models.vision.support import check_images

    # Not if a model was saved without its tokenizer.
    if source is None or not sees_images(model.config) or (Path(source).is_dir() and not _has_processor(source)):
        return []
    processor: Any = load_matching_processor(None, source, model)
    if getattr(processor, "image_processor", None) is None:
        return []
    groups = list(load_preferences([_row(processor, size) for size in (*_SIZES, None)], processor))
    try:
        check_images(model, [placed.image for group in groups for placed in group.sequences[0].images])
    except UnsupportedModelError:
        return []
    return groups


def _has_processor(source: str) -> bool:
    return any(Path(source).glob("*processor_config.json"))


def _row(processor: Any, size: tuple[int, int] | None) -> dict[str, Any]:
    from PIL import Image

    pictures = [] if size is None else [Image.linear_gradient("L").rotate(30).convert("RGB").resize(size)]
    prompt: Any = "What is it?"
    if getattr(processor, "chat_template", None):
        parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": parts}]
    return {"prompt": prompt, "images": pictures, "chosen": "It is grey.", "rejected": "It is"}
