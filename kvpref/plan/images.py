"""The table of image features that a plan's passes read."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from itertools import accumulate
from typing import NamedTuple

from kvpref.prefix.images import FeatureRun
from kvpref.records.groups import Sequence
from kvpref.records.images import Image, unique_images


class ImageTable(NamedTuple):
    """The features read by the passes over some sequences, (R, hidden_size), image after image.

    Attributes:
        images: The images whose features are its rows, in order.
        runs: Per sequence, which rows stand at which positions.
    """

    images: tuple[Image, ...]
    runs: tuple[tuple[FeatureRun, ...], ...]


def shared_table(sequences: AbstractSequence[Sequence]) -> ImageTable:
    """The table with every image once."""
    if not any(sequence.images for sequence in sequences):
        return ImageTable((), ((),) * len(sequences))
    images = unique_images(placed.image for sequence in sequences for placed in sequence.images)
    rows = dict(zip((image.key for image in images), _first_rows(images), strict=True))
    runs = tuple(
        tuple(_runs(sequence, [rows[placed.image.key] for placed in sequence.images])) for sequence in sequences
    )
    return ImageTable(images, runs)


def repeated_table(sequences: AbstractSequence[Sequence]) -> ImageTable:
    """The table with every image once per sequence that holds it, as in ordinary training."""
    images = tuple(placed.image for sequence in sequences for placed in sequence.images)
    rows = iter(_first_rows(images))
    runs = tuple(tuple(_runs(sequence, [next(rows) for _ in sequence.images])) for sequence in sequences)
    return ImageTable(images, runs)


def _first_rows(images: tuple[Image, ...]) -> list[int]:
    return list(accumulate((image.num_tokens for image in images), initial=0))[: len(images)]


def _runs(sequence: Sequence, rows: list[int]) -> Iterator[FeatureRun]:
    for placed, row in zip(sequence.images, rows, strict=True):
        for first, stop in placed.runs:
            yield FeatureRun(first, stop, row)
            row += stop - first
