"""Groups in flat arrays: five bytes per token instead of some fifty for tuples of Python integers.

That keeps a data set of a hundred million tokens in half a gigabyte, and cheap to hand to DataLoader workers.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from kvpref.data.digests import DIGEST_BYTES
from kvpref.prefix.tree import shared_prefix_length
from kvpref.records.groups import Group, Sequence
from kvpref.records.images import Image, PlacedImage


class PackedGroups:
    """An append-only list of groups. Token ids must fit in 32 bits."""

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        self._input_ids = array("i")
        self._scored = bytearray()
        self._sequence_ends = array("q", [0])
        self._group_ends = array("q", [0])
        self._scores: list[tuple[float | None, ...] | None] = []
        self._ranks: dict[int, tuple[float | None, ...]] = {}  # only of groups that have any
        self._labels: list[tuple[bool, ...] | None] = []
        self._ids: list[str | None] = []
        self._columns: dict[int, dict[str, Any]] = {}  # only of groups that have any
        # Only of groups that have any: per sequence its images; one tuple where all have the same, as they mostly do.
        self._placed: dict[int, tuple[tuple[PlacedImage, ...], ...]] = {}
        self._images: dict[str, Image] = {}
        self._first_rows: dict[str, int] = {}  # of each image, were the rows of all images in one table
        self._num_rows = 0
        for group in groups:
            self.append(group)

    def append(self, group: Group) -> None:
        """Add one group at the end."""
        for sequence in group.sequences:
            self._input_ids.extend(sequence.input_ids)
            self._scored.extend(sequence.scored)
            self._sequence_ends.append(len(self._input_ids))
        self._group_ends.append(len(self._sequence_ends) - 1)
        self._scores.append(group.scores)
        if group.ranks is not None:
            self._ranks[len(self._ids)] = group.ranks
        self._labels.append(group.labels)
        if group.columns:
            self._columns[len(self._ids)] = {name: _packed(value) for name, value in group.columns.items()}
        if any(sequence.images for sequence in group.sequences):
            placed = tuple(map(self._keep_images, group.sequences))
            self._placed[len(self._ids)] = placed[:1] if len(set(placed)) == 1 else placed
        self._ids.append(group.id)

    def _keep_images(self, sequence: Sequence) -> tuple[PlacedImage, ...]:
        """A sequence's images, those with equal keys as one object."""
        for image, _ in sequence.images:
            if image.key not in self._images:
                self._images[image.key] = image
                self._first_rows[image.key] = self._num_rows
                self._num_rows += image.num_tokens
        return tuple(PlacedImage(self._images[image.key], runs) for image, runs in sequence.images)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Group:
        spans = list(self._spans(index))
        sequences = [
            Sequence(self._input_ids[start:end], [flag == 1 for flag in self._scored[start:end]], images)
            for (start, end), images in zip(spans, self._images_of(index, len(spans)), strict=True)
        ]
        ranks = self._ranks.get(index)
        return Group(
            sequences,
            scores=self._scores[index] if ranks is None else None,
            ranks=ranks,
            labels=self._labels[index],
            id=self._ids[index],
            columns=self._columns_of(index),
        )

    def __iter__(self) -> Iterator[Group]:
        return (self[index] for index in range(len(self)))

    def _images_of(self, index: int, num_sequences: int) -> tuple[tuple[PlacedImage, ...], ...]:
        placed = self._placed.get(index, ((),))
        return placed * num_sequences if len(placed) == 1 else placed

    def images(self) -> tuple[Image, ...]:
        """Every image of a group, once."""
        return tuple(self._images.values())

    def token_ids(self) -> set[int]:
        """Every token id that occurs."""
        return set(self._input_ids)

    def id_of(self, index: int) -> str | None:
        """The id of one group, without building it."""
        return self._ids[index]

    def beginning_of(self, index: int) -> array[int]:
        """The tokens that all sequences of a group begin with, up to the first that is scored in the first sequence.

        Placeholders of images are negative, and equal just where the images are; every process numbers them alike.
        """
        spans = list(self._spans(index))
        sequences = [self._input_ids[start:end] for start, end in spans]
        if index in self._placed:
            sequences = list(map(self._tell_images_apart, sequences, self._images_of(index, len(spans))))
        # Arrays slice and compare as tuples do; what the smallest and the largest share, all of them share.
        shared = shared_prefix_length(min(sequences), max(sequences))  # type: ignore[arg-type]
        scored = self._scored.find(1, *spans[0])
        return sequences[0][: shared if scored < 0 else min(shared, scored - spans[0][0])]

    def _tell_images_apart(self, tokens: array[int], placed: tuple[PlacedImage, ...]) -> array[int]:
        ids = array("q", tokens)
        for image, runs in placed:
            row = self._first_rows[image.key]
            for first, stop in runs:
                ids[first:stop] = array("q", range(-1 - row, -1 - row - (stop - first), -1))
                row += stop - first
        return ids

    def _spans(self, index: int) -> Iterator[tuple[int, int]]:
        for sequence in range(self._group_ends[index], self._group_ends[index + 1]):
            yield self._sequence_ends[sequence], self._sequence_ends[sequence + 1]

    def _columns_of(self, index: int) -> dict[str, Any]:
        return {name: _unpacked(value) for name, value in self._columns.get(index, {}).items()}

    def fingerprint(self) -> str:
        """Hex SHA-256 over token ids, scored flags, images, labels, scores, ranks and columns; ids hold paths."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            self._add_to(digest, index)
        return digest.hexdigest()

    def digests(self) -> bytes:
        """`DIGEST_BYTES` per group, over what `fingerprint` is over."""
        found = bytearray()
        for index in range(len(self)):
            digest = hashlib.sha256()
            self._add_to(digest, index)
            found += digest.digest()[:DIGEST_BYTES]
        return bytes(found)

    def _add_to(self, digest: hashlib._Hash, index: int) -> None:
        spans = list(self._spans(index))
        digest.update(struct.pack("<q", len(spans)))
        for start, end in spans:
            tokens = self._input_ids[start:end]
            if sys.byteorder == "big":
                tokens.byteswap()
            digest.update(struct.pack("<q", end - start))
            digest.update(tokens.tobytes())
            digest.update(self._scored[start:end])
        for number, placed in enumerate(self._placed.get(index, ())):
            for image, runs in placed:
                digest.update(f"i{number}:{image.key}:{image.num_tokens}:{runs}".encode())
        labels, scores = self._labels[index], self._scores[index]
        digest.update(b"-" if labels is None else b"l" + bytes(labels))
        kind = b"r" if index in self._ranks else b"s"
        digest.update(b"-" if scores is None else kind + b"".join(map(_score_bytes, scores)))
        if index in self._columns:
            # Groups made in memory may hold what JSON cannot.
            columns = _whole_numbers(self._columns_of(index))
            digest.update(b"c" + json.dumps(columns, sort_keys=True, default=repr).encode())


def _score_bytes(score: float | None) -> bytes:
    return b"-" if score is None else b"=" + struct.pack("<d", score)


def _whole_numbers(value: Any) -> Any:
    """Floats that are whole as integers: a column of a table has one type for all rows, a line of JSON its own."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    return [_whole_numbers(item) for item in value] if isinstance(value, list | tuple) else value


def _packed(value: Any) -> Any:
    """A column's value with its lists of floats as arrays: a number per token is then eight bytes, not thirty."""
    if not isinstance(value, list):
        return value
    if value and all(type(item) is float for item in value):
        return array("d", value)
    return [_packed(item) for item in value]


def _unpacked(value: Any) -> Any:
    if isinstance(value, array):
        return value.tolist()
    return [_unpacked(item) for item in value] if isinstance(value, list) else value
