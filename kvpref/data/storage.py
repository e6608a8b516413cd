"""Groups in flat arrays: five bytes per token instead of about fifty for tuples of Python integers.

That keeps a dataset of a hundred million tokens in half a gigabyte, and cheap to send to DataLoader workers.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpref.data.batching.lengths import common_length
from kvpref.data.digests import DIGEST_BYTES
from kvpref.records.groups import Group, Sequence
from kvpref.records.images import Image, PlacedImage


class PackedGroups:
    """An append-only list of groups. Token ids must fit in 32 bits.

    Its flat arrays hold the parts of all sequences (`Sequence.parts`), one after another. Growing arrays cannot be
    shared with numpy, so groups are built from copies; token ids are widened to 64 bits anyway.
    """

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        self._input_ids = array("i")
        self._scored = bytearray()
        self._part_ends = array("q", [0])
        self._group_ends = array("q", [0])  # among the parts
        self._num_parts: dict[int, array[int]] = {}  # per sequence, only for groups with earlier sequences
        self._weights: dict[int, tuple[array[float] | None, ...]] = {}  # per part, only for groups that have any
        self._scores: list[tuple[float | None, ...] | None] = []
        self._ranks: dict[int, tuple[float | None, ...]] = {}  # only of groups that have any
        self._labels: list[tuple[bool, ...] | None] = []
        self._ids: list[str | None] = []
        self._columns: dict[int, dict[str, Any]] = {}  # only of groups that have any
        # Only for groups that have any: the images of each part; one tuple if all have the same, as is usual.
        self._placed: dict[int, tuple[tuple[PlacedImage, ...], ...]] = {}
        self._images: dict[str, Image] = {}
        self._first_rows: dict[str, int] = {}  # of each image, as if the rows of all images were in one table
        self._num_rows = 0
        for group in groups:
            self.append(group)

    def append(self, group: Group) -> None:
        """Add one group at the end."""
        parts = group.parts
        for part in parts:
            self._input_ids.frombytes(_narrowed(part.ids).tobytes())
            self._scored += part.flags.tobytes()
            self._part_ends.append(len(self._input_ids))
        self._group_ends.append(len(self._part_ends) - 1)
        if len(parts) > len(group):
            self._num_parts[len(self._ids)] = array("i", [len(sequence.parts) for sequence in group.sequences])
        if any(part.weights is not None for part in parts):
            self._weights[len(self._ids)] = tuple(
                None if part.weights is None else array("d", part.weights) for part in parts
            )
        self._scores.append(group.scores)
        if group.ranks is not None:
            self._ranks[len(self._ids)] = group.ranks
        self._labels.append(group.labels)
        if group.columns:
            self._columns[len(self._ids)] = {name: _packed(value) for name, value in group.columns.items()}
        if any(part.images for part in parts):
            placed = tuple(map(self._keep_images, parts))
            self._placed[len(self._ids)] = placed[:1] if len(set(placed)) == 1 else placed
        self._ids.append(group.id)

    def _keep_images(self, sequence: Sequence) -> tuple[PlacedImage, ...]:
        """A sequence's images, with one object per key."""
        for image, _ in sequence.images:
            if image.key not in self._images:
                self._images[image.key] = image
                self._first_rows[image.key] = self._num_rows
                self._num_rows += image.num_tokens
        return tuple(PlacedImage(self._images[image.key], runs) for image, runs in sequence.images)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Group:
        sequences = self._parts_of(index)
        if index in self._num_parts:
            parts = iter(sequences)
            sequences = [_joined([next(parts) for _ in range(number)]) for number in self._num_parts[index]]
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

    def _parts_of(self, index: int) -> list[Sequence]:
        spans = list(self._spans(index))
        first, stop = spans[0][0], spans[-1][1]
        ids = np.frombuffer(self._input_ids, dtype=np.int32, count=stop - first, offset=4 * first).astype(np.int64)
        flags = np.frombuffer(self._scored, dtype=np.bool_, count=stop - first, offset=first).copy()
        # Sequences can then take slices directly.
        ids.flags.writeable = flags.flags.writeable = False
        weights = self._weights.get(index, (None,) * len(spans))
        return [
            Sequence(ids[start - first : end - first], flags[start - first : end - first], images, own)
            for (start, end), images, own in zip(spans, self._images_of(index, len(spans)), weights, strict=True)
        ]

    def _images_of(self, index: int, num_parts: int) -> tuple[tuple[PlacedImage, ...], ...]:
        placed = self._placed.get(index, ((),))
        return placed * num_parts if len(placed) == 1 else placed

    def images(self) -> tuple[Image, ...]:
        """Every image of a group, once."""
        return tuple(self._images.values())

    def token_ids(self) -> set[int]:
        """Every token id that occurs."""
        return set(np.unique(np.frombuffer(self._input_ids, dtype=np.int32)).tolist())

    def id_of(self, index: int) -> str | None:
        """The id of one group, without building it."""
        return self._ids[index]

    def beginning_of(self, index: int) -> array[int]:
        """The tokens that all parts of a group begin with, up to the first part's first scored token.

        Placeholders of images are negative, and equal exactly if the images are; every process numbers them alike.
        """
        spans = list(self._spans(index))
        parts = [self._input_ids[start:end] for start, end in spans]
        if index in self._placed:
            parts = list(map(self._tell_images_apart, parts, self._images_of(index, len(spans))))
        shared = common_length([np.frombuffer(part, dtype=f"i{part.itemsize}") for part in parts])
        scored = self._scored.find(1, *spans[0])
        return parts[0][: shared if scored < 0 else min(shared, scored - spans[0][0])]

    def _tell_images_apart(self, tokens: array[int], placed: tuple[PlacedImage, ...]) -> array[int]:
        ids = array("q", tokens)
        for image, runs in placed:
            row = self._first_rows[image.key]
            for first, stop in runs:
                ids[first:stop] = array("q", range(-1 - row, -1 - row - (stop - first), -1))
                row += stop - first
        return ids

    def _spans(self, index: int) -> Iterator[tuple[int, int]]:
        for part in range(self._group_ends[index], self._group_ends[index + 1]):
            yield self._part_ends[part], self._part_ends[part + 1]

    def _columns_of(self, index: int) -> dict[str, Any]:
        return {name: _unpacked(value) for name, value in self._columns.get(index, {}).items()}

    def fingerprint(self) -> str:
        """Hex SHA-256 over the content of all groups except their ids, which contain paths.

        Absent content (weights, earlier sequences) adds nothing, so that fingerprints stay valid as kinds are added.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            self._add_to(digest, index)
        return digest.hexdigest()

    def digests(self) -> bytes:
        """`DIGEST_BYTES` per group, over the same content as `fingerprint`."""
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
        if index in self._num_parts:
            digest.update(f"p{self._num_parts[index].tolist()}".encode())
        for number, weights in enumerate(self._weights.get(index, ())):
            if weights is not None:
                digest.update(f"w{number}:".encode() + struct.pack(f"<{len(weights)}d", *weights))
        labels, scores = self._labels[index], self._scores[index]
        digest.update(b"-" if labels is None else b"l" + bytes(labels))
        kind = b"r" if index in self._ranks else b"s"
        digest.update(b"-" if scores is None else kind + b"".join(map(_score_bytes, scores)))
        if index in self._columns:
            # Groups made in memory may hold what JSON cannot.
            columns = _whole_numbers(self._columns_of(index))
            digest.update(b"c" + json.dumps(columns, sort_keys=True, default=repr).encode())


def _narrowed(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    narrow = ids.astype(np.int32)
    if not np.array_equal(narrow, ids):
        raise OverflowError(f"token id {ids[narrow != ids][0]} does not fit in 32 bits")
    return narrow


def _joined(parts: list[Sequence]) -> Sequence:
    """The last part, with the others as earlier sequences."""
    *earlier, last = parts
    return Sequence(last.ids, last.flags, last.images, last.weights, earlier) if earlier else last


def _score_bytes(score: float | None) -> bytes:
    return b"-" if score is None else b"=" + struct.pack("<d", score)


def _whole_numbers(value: Any) -> Any:
    """Whole floats as integers: a table's column has one type for all rows, while each JSON line has its own."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    return [_whole_numbers(item) for item in value] if isinstance(value, list | tuple) else value


def _packed(value: Any) -> Any:
    """A column's value with lists of floats as arrays, so that a number per token takes eight bytes, not thirty."""
    if not isinstance(value, list):
        return value
    if value and all(type(item) is float for item in value):
        return array("d", value)
    return [_packed(item) for item in value]


def _unpacked(value: Any) -> Any:
    if isinstance(value, array):
        return value.tolist()
    return [_unpacked(item) for item in value] if isinstance(value, list) else value
