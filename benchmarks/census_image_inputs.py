"""Inputs of vision towers, by kind of tower: made-up pixels for two image sizes.

Each function gives one image's inputs as the family's processor would make them for it alone. Shape legend: P patch
size, S side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, Any]
Maker = Callable[[Any, int, torch.Generator], Inputs]
_CHANNELS = 3


def _number(config: Any, *names: str, otherwise: int = 1) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value[0] if isinstance(value, list | tuple) else value)
    return otherwise


def _noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def tiles(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(tiles, 3, S, S): one, or three."""
    side = _number(vision, "image_size", otherwise=32)
    return {"pixel_values": _noise(generator, 1 + 2 * size, _CHANNELS, side, side)}


def square(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, 3, S, S), whatever the image's size."""
    return tiles(vision, 0, generator)


def grid(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """Patches of an image of any size, (h * w, pixels of a patch), and its grid."""
    height, width = ((4, 4), (4, 8))[size]
    patch, times = _number(vision, "patch_size"), _number(vision, "temporal_patch_size", "patch_temporal")
    pixels = _noise(generator, height * width, _CHANNELS * times * patch * patch)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def grid_of_patches(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """The same with patches as (h * w, 3, P, P)."""
    inputs = grid(vision, size, generator)
    patch = _number(vision, "patch_size")
    num_patches = len(inputs["pixel_values"])
    return {
        **inputs,
        "pixel_values": inputs["pixel_values"][:, : 3 * patch * patch].reshape(num_patches, 3, patch, patch),
    }


def grid_with_merges(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """The same, and the merge factor of each image."""
    return {**grid(vision, size, generator), "image_merge_sizes": torch.tensor([2])}


def whole(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, 3, height, width) and the image's size."""
    patch = _number(vision, "patch_size")
    height, width = ((4 * patch, 4 * patch), (4 * patch, 6 * patch))[size]
    return {"pixel_values": _noise(generator, 1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}


def any_resolution(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, tiles, 3, S, S), the whole image and its tiles, and the image's size."""
    side = _number(vision, "image_size")
    num_tiles, image_size = ((2, (side - 8, 2 * side - 8)), (3, (2 * side, 2 * side - 12)))[size]
    num_tiles = (3, 5)[size]
    return {
        "pixel_values": _noise(generator, 1, num_tiles, 3, side, side),
        "image_sizes": torch.tensor([image_size]),
    }


def masked_tiles(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, tiles, 3, S, S) and (1, tiles, S, S), 1 where pixels are the image's."""
    side = _number(vision, "image_size")
    pixels = _noise(generator, 1, 1 + 2 * size, 3, side, side)
    mask = torch.ones(1, 1 + 2 * size, side, side, dtype=torch.int64)
    if size:
        mask[:, -1, side // 2 :] = 0
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def chosen_tiles(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, tiles, 3, S, S) and (1, tiles), true for tiles that are not padding."""
    side = _number(vision, "image_size")
    mask = torch.ones(1, 1 + 2 * size, dtype=torch.bool)
    return {"pixel_values": _noise(generator, 1, 1 + 2 * size, 3, side, side), "pixel_attention_mask": mask}


def placed_patches(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, patches, pixels of a patch) and each patch's place, -1 for padding."""
    patch, pool = _number(vision, "patch_size", "model_patch_size"), _number(vision, "pooling_kernel_size")
    height, width, num_patches = pool * (1 + size), 2 * pool, 6 * pool * pool
    places = torch.full((1, num_patches, 2), -1)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places[0, : height * width] = torch.stack([x, y], -1).reshape(-1, 2)
    pixels = _noise(generator, 1, num_patches, 3 * patch * patch)
    pixels[0, height * width :] = 0
    return {"pixel_values": pixels.sigmoid(), "image_position_ids": places}


def merged_patches(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, patches, pixels of a merged patch) and each one's place, -1 for padding."""
    side, num_tokens = _number(vision, "model_patch_size"), 4 + 2 * size
    places = torch.full((1, 6, 2), -1)
    places[0, :num_tokens] = torch.stack([torch.arange(num_tokens) % 2, torch.arange(num_tokens) // 2], -1)
    return {"pixel_values": _noise(generator, 1, 6, 3 * side * side).sigmoid(), "image_position_ids": places}


def flat_grid(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """A grid whose patches hold one picture, not several in time."""
    inputs = grid(vision, size, generator)
    return {**inputs, "pixel_values": inputs["pixel_values"][:, : 3 * _number(vision, "patch_size") ** 2]}


def square_and_instruction(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, 3, S, S), and the question about the image."""
    ids = torch.randint(5, 90, (1, 4), generator=generator)
    return {**square(vision, size, generator), "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def shaped_patches(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, patches, pixels of a patch), padded, with the image's shape in patches and its mask."""
    patch = _number(vision, "patch_size")
    height, width, num_patches = 4, 4 + 2 * size, 32
    mask = (torch.arange(num_patches) < height * width).long()[None]
    pixels = _noise(generator, 1, num_patches, 3 * patch * patch) * mask[..., None]
    return {"pixel_values": pixels, "spatial_shapes": torch.tensor([[height, width]]), "pixel_attention_mask": mask}


def strips(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, 3, P, patches * P), all patches side by side, and the image's shape in patches."""
    patch = _number(vision, "patch_size")
    height, width = ((4, 4), (4, 8))[size]
    pixels = _noise(generator, 1, 3, patch, height * width * patch)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[height, width]], dtype=torch.int32)}


def masked_pixels(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, 3, S, S) and (1, S, S), true where pixels are the image's."""
    side = _number(vision, "image_size")
    mask = torch.ones(1, side, side, dtype=torch.bool)
    if size:
        mask[:, side // 2 :] = False
    return {"pixel_values": _noise(generator, 1, 3, side, side), "pixel_mask": mask}


def two_resolutions(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, 3, S, S), and the same image at a higher resolution."""
    side = _number(vision, "image_size")
    return {**tiles(vision, 0, generator), "high_res_pixel_values": _noise(generator, 1, 3, 2 * side, 2 * side)}


def local_and_whole(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, 3, S, S), and its crops if it is large."""
    side = _number(vision, "image_size")
    crops = {"pixel_values_local": _noise(generator, 2, 3, side, side)} if size else {}
    return {**tiles(vision, 0, generator), **crops, "num_local_patches": torch.tensor([2 * size])}


def fuyu_patches(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, patches, pixels of a patch)."""
    return {"pixel_values": _noise(generator, 1, 4 + 4 * size, 3 * 8 * 8)}


def aspect_tiles(vision: Any, size: int, generator: torch.Generator) -> Inputs:
    """(1, 1, tiles, 3, S, S), padded to two tiles, with the image's shape in tiles."""
    side = _number(vision, "image_size")
    pixels = _noise(generator, 1, 1, 2, 3, side, side)
    pixels[:, :, 1 + size :] = 0
    mask = torch.tensor([[[1, size]]])
    return {"pixel_values": pixels, "aspect_ratio_ids": torch.tensor([[1 + size]]), "aspect_ratio_mask": mask}


def cross_attention_mask(ids: list[int], image: int, num_tiles: list[int]) -> torch.Tensor:
    """(1, T, images, 2): each token sees the tiles of the last images before it."""
    mask = torch.zeros(1, len(ids), len(num_tiles), 2, dtype=torch.int64)
    places = [place for place, token in enumerate(ids) if token == image]
    for number, (place, tiles) in enumerate(zip(places, num_tiles, strict=True)):
        later = [other for other in places[number + 1 :] if other != place + 1]
        mask[0, place : later[0] if later else len(ids), number, :tiles] = 1
    return mask


def joined(images: list[Inputs], dim: int) -> Inputs:
    """The inputs of several images of one sequence, as a processor makes them together."""
    names = dict.fromkeys(name for image in images for name in image)
    return {name: _joined([image[name] for image in images if name in image], name, dim) for name in names}


def _joined(parts: list[torch.Tensor], name: str, dim: int) -> torch.Tensor:
    """The parts concatenated, padded to the largest."""
    if name == "pixel_values" and parts[0].ndim == 4 and parts[0].shape[-1] % parts[0].shape[-2] == 0 and dim == 3:
        return torch.cat(parts, dim=3)
    dim = dim if parts[0].ndim > dim else 0
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    padded = []
    for part in parts:
        wanted = [part.shape[axis] if axis == dim else shape[axis] for axis in range(part.ndim)]
        room = part.new_full(wanted, -1 if name == "image_position_ids" else 0)
        room[tuple(slice(size) for size in part.shape)] = part
        padded.append(room)
    return torch.cat(padded, dim=dim)
