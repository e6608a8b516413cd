"""Features of images: a model's own vision tower and projector, run on several images at once.

Shape legend: R feature rows of all images; hidden_size is that of the text layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kvpref.errors import RunError, UnsupportedModelError
from kvpref.models.backbone import backbone
from kvpref.models.vision.families import family_of
from kvpref.models.vision.image_states import states_of_images
from kvpref.plan.batch import ImageInputs
from kvpref.records.host_copies import to_device
from kvpref.records.images import Image
from kvpref.state.image_features import ImageFeatures
from kvpref.tracing import mark


def has_tower(model: PreTrainedModel) -> bool:
    """Whether a model turns images into features."""
    return family_of(model).cross_attention or hasattr(_owner(model), "get_image_features")


def _owner(model: PreTrainedModel) -> Any:
    """The module whose method makes image features: the backbone, or the whole model (Llama 4)."""
    base = backbone(model)
    return base if hasattr(base, "get_image_features") else model


def image_features(model: PreTrainedModel, images: Sequence[Image], inputs: Mapping[str, ImageInputs]) -> ImageFeatures:
    """Features of images, image after image.

    Args:
        model: The model whose tower runs.
        images: The images, at least one.
        inputs: The tower's inputs by image key, in host memory.

    Returns:
        The features, one row per placeholder.

    Raises:
        RunError: If the tower does not make one row per placeholder.
    """
    parts: dict[int, list[torch.Tensor]] = {}
    for numbers in _of_equal_shapes(images, inputs, family_of(model).join):
        token_id = images[numbers[0]].token_id
        made = _run_tower(model, [inputs[images[number].key] for number in numbers], token_id)
        sizes = [images[number].num_tokens for number in numbers]
        for tensor in made:
            if tensor.shape[0] != sum(sizes):
                raise RunError(
                    f"the vision tower of {type(model).__name__} made {tensor.shape[0]} rows of features for "
                    f"{sum(sizes)} placeholders; the prompts were not made by this model's processor"
                )
        for number, *rows in zip(numbers, *(tensor.split(sizes) for tensor in made), strict=True):
            parts[number] = rows
    features, *deepstack = (
        torch.cat(several) for several in zip(*(parts[number] for number in range(len(images))), strict=True)
    )
    return ImageFeatures(features, tuple(deepstack))


def inputs_named_by(function: Any, inputs: Sequence[ImageInputs], join: int = 0) -> dict[str, Any]:
    """The inputs that a function takes, joined over all images.

    Args:
        function: Takes them by name.
        inputs: The inputs of each image.
        join: The dimension along which images are concatenated; the first in tensors with fewer dimensions.
    """
    parameters = inspect.signature(function).parameters
    takes_all = "args" in parameters  # hidden behind a decorator
    names = [name for name in inputs[0] if name in parameters or takes_all]
    return {name: _joined([of_image[name] for of_image in inputs], join) for name in names}


def _run_tower(model: PreTrainedModel, inputs: Sequence[ImageInputs], token_id: int) -> tuple[torch.Tensor, ...]:
    owner, family = _owner(model), family_of(model)
    base: Any = backbone(model)
    function = base.vision_model.forward if family.cross_attention else owner.get_image_features
    weight = next(model.parameters())
    given = {
        name: to_device(value, weight.device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs_named_by(function, inputs, family.join).items()
    }
    mark("pixel inputs", *(value for value in given.values() if isinstance(value, torch.Tensor)))
    if family.casts_pixels:
        given = {name: _cast(value, weight.dtype) for name, value in given.items()}
    if family.cross_attention:
        return (states_of_images(model, given, token_id),)
    try:
        made = function(**given, return_dict=True)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} of this release of transformers makes image features in another way ({error}); "
            "update transformers"
        ) from error
    features = made.last_hidden_state if made.pooler_output is None else made.pooler_output
    if family.projector:
        features = getattr(owner, family.projector)(features)
    deepstack = getattr(made, "deepstack_features", None) or ()
    return tuple(_rows(value) for value in (features, *deepstack))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _rows(made: Any) -> torch.Tensor:
    """Features of several images as rows; families return one tensor, or one per image."""
    several: Iterable[torch.Tensor] = (made,) if isinstance(made, torch.Tensor) else made
    rows = [tensor.flatten(0, -2) for tensor in several]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _joined(values: Sequence[Any], join: int) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return first if len(values) == 1 else torch.cat(tuple(values), dim=_dimension(first, join))
    if isinstance(first, list | tuple):
        return [item for value in values for item in value]
    if any(value != first for value in values):
        raise UnsupportedModelError(f"images of one batch differ in an input that is not a tensor: {first!r}")
    return first


def _dimension(tensor: torch.Tensor, join: int) -> int:
    return join if tensor.ndim > join else 0


def _of_equal_shapes(images: Sequence[Image], inputs: Mapping[str, ImageInputs], join: int) -> list[list[int]]:
    """Indices of images whose inputs can be joined, as groups."""
    found: dict[Any, list[int]] = {}
    for number, image in enumerate(images):
        shapes = tuple(
            (name, _shape_beside(value, join), value.dtype) if isinstance(value, torch.Tensor) else (name,)
            for name, value in inputs[image.key].items()
        )
        found.setdefault(shapes, []).append(number)
    return list(found.values())


def _shape_beside(tensor: torch.Tensor, join: int) -> tuple[int, ...]:
    """All dimensions except the one along which images are joined."""
    dimension = _dimension(tensor, join)
    return tuple(size for number, size in enumerate(tensor.shape) if number != dimension)
