"""Splits the pixel inputs of several prompts, joined by a processor for one model call, into images.

A model puts the features of a call's pixel inputs, in order, in place of the call's placeholders, in order. So the
inputs are cut into the smallest pieces that the tower processes independently, and each takes as many placeholders as
it has rows of features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from kvpref.errors import InputError, UnsupportedModelError
from kvpref.models.backbone import backbone
from kvpref.models.vision.families import VISION
from kvpref.models.vision.fingerprints import image_keys
from kvpref.records.images import Image, PlacedImage, runs_of

Inputs = Mapping[str, torch.Tensor]


class Piece(NamedTuple):
    """Inputs that the tower processes independently, and the number of their placeholders."""

    inputs: dict[str, torch.Tensor]
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """How to split the pixel inputs of some families."""

    split: Callable[[Any, Inputs, int], list[Piece]]
    """Splits inputs, given the model's backbone, the inputs and the number of all placeholders."""

    names: tuple[str, ...]
    """The inputs, `pixel_values` first; the others may be missing."""


def splitter_of(config: Any) -> Splitter:
    """How to split a model's pixel inputs.

    Raises:
        UnsupportedModelError: If nobody has checked it.
    """
    if config.model_type not in SPLIT_FAMILIES:
        raise UnsupportedModelError(
            f"kvpref does not know which pixel inputs of a {config.model_type!r} model belong to which image; "
            f"it does for {', '.join(SPLIT_FAMILIES)}"
        )
    return SPLITTERS[config.model_type]


def split_images(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], inputs: Inputs
) -> list[tuple[PlacedImage, ...]]:
    """The images of each row; those with equal pixels have equal keys.

    Args:
        model: The model whose tower reads them.
        rows: Token ids of each row, without padding.
        inputs: Pixel inputs of all rows; small integers of them are copied to the host, pixels stay where they are.

    Raises:
        UnsupportedModelError: If nobody has checked how to split the model's inputs.
        InputError: If they do not match the placeholders of the rows.
    """
    config: Any = model.config
    splitter = splitter_of(config)
    token_id = config.image_token_id
    places = [[place for place, token in enumerate(row) if token == token_id] for row in rows]
    given = {name: inputs[name].detach() for name in splitter.names if inputs.get(name) is not None}
    pieces = splitter.split(backbone(model), given, sum(map(len, places)))
    images = [
        Image(key=key, token_id=token_id, num_tokens=piece.num_tokens, read=partial(dict[str, Any], piece.inputs))
        for piece, key in zip(pieces, image_keys([piece.inputs for piece in pieces]), strict=True)
    ]
    return list(_placed(images, places))


def _placed(images: list[Image], places: list[list[int]]) -> Iterator[tuple[PlacedImage, ...]]:
    remaining = iter(images)
    for number, own in enumerate(places):
        found, first = [], 0
        while first < len(own):
            image = next(remaining, None)
            if image is None or first + image.num_tokens > len(own):
                raise _mismatch(f"row {number} has {len(own)} placeholders, which its images do not fill")
            found.append(PlacedImage(image, runs_of(own[first : first + image.num_tokens])))
            first += image.num_tokens
        yield tuple(found)
    if next(remaining, None) is not None:
        raise _mismatch("there are more images than placeholders")


def _mismatch(found: str) -> InputError:
    # TRL looks for these first words and then says which setting to change.
    return InputError(
        f"Image features and image tokens do not match: {found}; was a row truncated (max_length), or made by another "
        "model's processor?"
    )


def _by_entry(base: Any, inputs: Inputs, num_placeholders: int) -> list[Piece]:
    """One entry per image, or per tile of an image; all have the same number of tokens."""
    count = len(inputs["pixel_values"])
    each, rest = divmod(num_placeholders, count)
    if rest or not each:
        raise _mismatch(f"{num_placeholders} placeholders stand for {count} images of one size")
    return [Piece({name: value[index : index + 1] for name, value in inputs.items()}, each) for index in range(count)]


def _by_grid(base: Any, inputs: Inputs, num_placeholders: int) -> list[Piece]:
    """Patches in one row, image after image, with a grid for each (Qwen-VL)."""
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"].cpu()
    sizes = grids.prod(dim=-1).tolist()
    if sum(sizes) != len(pixels):
        raise _mismatch(f"image_grid_thw counts {sum(sizes)} patches and pixel_values has {len(pixels)}")
    merged = base.config.vision_config.spatial_merge_size**2
    return [
        Piece({"pixel_values": patches, "image_grid_thw": grids[index : index + 1]}, len(patches) // merged)
        for index, patches in enumerate(pixels.split(sizes))
    ]


def _by_size(base: Any, inputs: Inputs, num_placeholders: int) -> list[Piece]:
    """One padded entry per image, with sizes if they differ (Pixtral)."""
    if "image_sizes" not in inputs:
        return _by_entry(base, inputs, num_placeholders)
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"].cpu()
    unit = base.config.vision_config.patch_size * getattr(base.config, "spatial_merge_size", 1)
    return [
        Piece(
            {"pixel_values": pixels[index : index + 1, :, :height, :width], "image_sizes": sizes[index : index + 1]},
            (height // unit) * (width // unit),
        )
        for index, (height, width) in enumerate(sizes.tolist())
    ]


def _by_tile(base: Any, inputs: Inputs, num_placeholders: int) -> list[Piece]:
    """One entry per row, with the tiles of all its images; tiles that are all zero are padding (Idefics 3)."""
    pixels = inputs["pixel_values"]
    real = (pixels != 0).flatten(2).any(dim=-1).nonzero().tolist()
    each, rest = divmod(num_placeholders, max(1, len(real)))
    if rest or not each:
        raise _mismatch(f"{num_placeholders} placeholders stand for {len(real)} tiles of one size")
    return [
        Piece({name: value[row : row + 1, tile : tile + 1] for name, value in inputs.items()}, each)
        for row, tile in real
    ]


def _by_position(base: Any, inputs: Inputs, num_placeholders: int) -> list[Piece]:
    """One entry per image, padded with patches at position -1, pooled by the tower (Gemma 4)."""
    pixels, positions = inputs["pixel_values"], inputs["image_position_ids"].cpu()
    pooled = base.config.vision_config.pooling_kernel_size**2
    counts = ((positions != -1).all(dim=-1).sum(dim=-1) // pooled).tolist()
    return [
        Piece(
            {"pixel_values": pixels[index : index + 1], "image_position_ids": positions[index : index + 1]}, num_tokens
        )
        for index, num_tokens in enumerate(counts)
    ]


def _by_anyres(base: Any, inputs: Inputs, num_placeholders: int) -> list[Piece]:
    """One entry per image with its tiles, which the model packs by the image's size (LLaVA-NeXT)."""
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"].cpu()
    if pixels.ndim != 5:
        raise InputError(
            f"pixel_values of {tuple(pixels.shape)}; kvpref takes (images, tiles, channels, height, width)"
        )
    alone = [1] * len(sizes)
    counts = inputs["batch_num_images"].tolist() if "batch_num_images" in inputs else alone
    tokens = _anyres_tokens(base, sizes, [count for count in counts for _ in range(count)])
    pieces, first = [], 0
    for count in counts:
        own = {"pixel_values": pixels[first : first + count], "image_sizes": sizes[first : first + count]}
        if "batch_num_images" in inputs:
            own["batch_num_images"] = torch.tensor([count])
        if count:
            pieces.append(Piece(own, sum(tokens[first : first + count])))
        first += count
    return pieces


def _anyres_tokens(base: Any, sizes: torch.Tensor, neighbours: list[int]) -> list[int]:
    """Tokens of each image, from the model's own packing of features of one channel."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = base.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    options = (
        {"vision_aspect_ratio": config.vision_aspect_ratio}
        if hasattr(config, "vision_aspect_ratio")
        else {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    )
    found = []
    for size, count in zip(sizes, neighbours, strict=True):
        num_tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        features = [torch.zeros(num_tiles if count == 1 else 1, side * side, 1)]
        packed, _ = base.pack_image_features(features, size.unsqueeze(0), image_newline=torch.zeros(1), **options)
        found.append(sum(len(rows) for rows in packed))
    return found


_KINDS: tuple[tuple[Splitter, str], ...] = (
    (
        Splitter(split=_by_entry, names=("pixel_values",)),
        "aya_vision cohere2_vision deepseek_vl gemma3 internvl janus llama4 qianfan_ocr video_llava vipllava",
    ),
    (Splitter(split=_by_entry, names=("pixel_values", "pixel_mask")), "aria"),
    (Splitter(split=_by_entry, names=("pixel_values", "high_res_pixel_values")), "deepseek_vl_hybrid"),
    (
        Splitter(split=_by_grid, names=("pixel_values", "image_grid_thw")),
        "cohere_compass cosmos3_edge cosmos3_omni exaone4_5 glm46v glm4v glm4v_moe glm_ocr glmga hyperclovax_vision_v2 "
        "lfm3_vl paddleocr_vl qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe",
    ),
    (Splitter(split=_by_size, names=("pixel_values", "image_sizes")), "lighton_ocr llava mistral3"),
    (
        Splitter(split=_by_tile, names=("pixel_values", "pixel_attention_mask")),
        "granite_docling idefics2 idefics3 smolvlm",
    ),
    (Splitter(split=_by_position, names=("pixel_values", "image_position_ids")), "gemma4"),
    (Splitter(split=_by_anyres, names=("pixel_values", "image_sizes")), "llava_next llava_next_video"),
    (
        Splitter(split=_by_anyres, names=("pixel_values", "image_sizes", "batch_num_images")),
        "llava_onevision",
    ),
)

SPLITTERS = {name: splitter for splitter, names in _KINDS for name in names.split()}
"""Splitters by model type."""

SPLIT_FAMILIES = tuple(sorted(name for name in SPLITTERS if name in VISION))
"""Model types that are exact with images and whose pixel inputs can be split."""
