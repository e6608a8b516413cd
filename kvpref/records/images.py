"""Images in prompts: their placeholders in a sequence's tokens, and how to get their tower's inputs.

No pixels here: a sequence names its images, and whoever runs the tower reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, eq=False)
class Image:
    """One image as a model's vision tower reads it.

    If a processor treats the images of a prompt together, such as when their number affects how each is cut into tiles,
    all of them are one `Image`.

    Args:
        key: Digest of its content and of everything that affects its processing: two images with equal keys have
            equal features, and prompts share them.
        token_id: The token id of its placeholders.
        num_tokens: Number of placeholders, at least one; in order, each is one row of its features.
        read: Makes the tower's inputs, name -> tensor on the CPU, as the model's processor does for this image alone;
            called when a batch is collated. Must be picklable if data workers collate.

    Raises:
        ValueError: If there are no placeholders, or more than 2**24.
    """

    key: str
    token_id: int
    num_tokens: int
    read: Callable[[], Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not 0 < self.num_tokens < 1 << _OFFSET_BITS:
            raise ValueError(f"image {self.key!r} has {self.num_tokens} placeholders; it needs at least one")


class PlacedImage(NamedTuple):
    """An image in a sequence.

    Attributes:
        image: The image.
        runs: Positions of its placeholders as [first, stop) runs, in order, `image.num_tokens` in total.
    """

    image: Image
    runs: tuple[tuple[int, int], ...]


def runs_of(places: AbstractSequence[int]) -> tuple[tuple[int, int], ...]:
    """Positions in order as [first, stop) runs."""
    firsts = [index for index in range(len(places)) if index == 0 or places[index] != places[index - 1] + 1]
    stops = [*firsts[1:], len(places)]
    return tuple((places[first], places[stop - 1] + 1) for first, stop in zip(firsts, stops, strict=True))


def check_places(images: AbstractSequence[PlacedImage], input_ids: tuple[int, ...], scored: tuple[bool, ...]) -> None:
    """Check that images are in order, each at its own placeholders, and that none of these is scored.

    Raises:
        ValueError: Naming the image.
    """
    end = 0
    for image, runs in images:
        num_tokens = sum(stop - first for first, stop in runs)
        if num_tokens != image.num_tokens:
            raise ValueError(f"image {image.key!r} has {image.num_tokens} placeholders, and its runs {num_tokens}")
        for first, stop in runs:
            if first < end or stop <= first or stop > len(input_ids):
                raise ValueError(f"image {image.key!r}: run [{first}, {stop}) is empty, out of order or out of range")
            if input_ids[first:stop].count(image.token_id) != stop - first:  # in C: groups are built often
                raise ValueError(
                    f"image {image.key!r}: a token in [{first}, {stop}) is not placeholder {image.token_id}"
                )
            if True in scored[first:stop]:
                raise ValueError(
                    f"image {image.key!r}: placeholders in [{first}, {stop}) are scored; no loss reads them"
                )
            end = stop


def unique_images(images: Iterable[Image]) -> tuple[Image, ...]:
    """The images without repeated keys, in order of first appearance."""
    found: dict[str, Image] = {}
    for image in images:
        known = found.setdefault(image.key, image)
        if known.num_tokens != image.num_tokens:
            raise ValueError(
                f"image {image.key!r} has {known.num_tokens} placeholders in one place, {image.num_tokens} in another"
            )
    return tuple(found.values())


def placeholder_ids(images: AbstractSequence[Image]) -> tuple[int, ...]:
    """Negative ids that distinguish the placeholders of these neighbouring images from all tokens and other images."""
    return own_ids(("images", *(image.key for image in images)), sum(image.num_tokens for image in images))


def own_ids(key: tuple[Any, ...], num_tokens: int) -> tuple[int, ...]:
    """(num_tokens,) negative ids that belong to `key` alone in this process, the same on every call."""
    number = _numbers.setdefault(key, len(_numbers))
    first = -1 - (number << _OFFSET_BITS)
    return tuple(range(first, first - num_tokens, -1))


_OFFSET_BITS = 24
_numbers: dict[tuple[Any, ...], int] = {}
