"""A padded batch as a prefix tree: which tokens its rows share, and the mapping back to rows and columns.

Integers only, on the CPU. Shape legend: B rows of L columns, U unique tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kvpref.plan.images import ImageTable, shared_table
from kvpref.plan.passes import PassPlan, Reads, RowRun, int64, level_blocks, pass_input_ids, row_runs
from kvpref.prefix.building import build_tree
from kvpref.prefix.images import feature_rows
from kvpref.prefix.levels import LevelSegments, build_levels, first_rows
from kvpref.prefix.segments import level_segments
from kvpref.prefix.tree import PrefixTree, ranges
from kvpref.records.groups import Sequence
from kvpref.records.images import Image, PlacedImage
from kvpref.records.tensor_fields import STAYS_ON_THE_HOST

# Stands for a first token at a position; larger than all token ids.
_FIRST_MARK = 1 << 62


class UnservedError(Exception):
    """A call that the model has to run unchanged; the message gives the reason in a few words."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedRows:
    """Where the real tokens of a padded batch stand: one run of columns per row.

    Attributes:
        input_ids: (B, L) int64.
        starts: (B,) int64, column of each row's first real token.
        stops: (B,) int64, column after its last one.
        first_positions: (B,) int64, position of its first real token; the others count up from there.
        keys: (B, L) int64, the ids by which rows are compared: token ids, and special ids for image placeholders.
        sequences: Per row its tokens and images; empty if no row has images.
    """

    input_ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    first_positions: np.ndarray
    keys: np.ndarray
    sequences: tuple[Sequence, ...] = ()

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64, real tokens of each row."""
        return self.stops - self.starts

    @classmethod
    def read(
        cls, input_ids: np.ndarray, attention_mask: np.ndarray | None, position_ids: np.ndarray | None
    ) -> PaddedRows:
        """Find the real tokens.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), 1 for real tokens and 0 for padding; None if all are real.
            position_ids: (B, L) or (1, L); None for columns as positions.

        Raises:
            UnservedError: If a row's real tokens are not one run, or their positions do not count up by one.
        """
        num_columns = input_ids.shape[1]
        real = np.ones(input_ids.shape, dtype=bool) if attention_mask is None else attention_mask == 1
        if attention_mask is not None and not (real | (attention_mask == 0)).all():
            raise UnservedError("attention_mask with values other than 0 and 1")
        starts = real.argmax(axis=1)
        stops = num_columns - real[:, ::-1].argmax(axis=1)
        if not real.any(axis=1).all() or not np.array_equal(stops - starts, real.sum(axis=1)):
            raise UnservedError("attention_mask with gaps or empty rows")
        first_positions = starts
        if position_ids is not None:
            shifts = position_ids - np.arange(num_columns)
            shift = np.take_along_axis(np.broadcast_to(shifts, input_ids.shape), starts[:, None], axis=1)
            if not ((shifts == shift) | ~real).all():
                raise UnservedError("position_ids that do not count up by one")
            first_positions = starts + shift[:, 0]
        return cls(input_ids=input_ids, starts=starts, stops=stops, first_positions=first_positions, keys=input_ids)

    def with_images(self, images: list[tuple[PlacedImage, ...]]) -> PaddedRows:
        """The same rows, which share placeholders only where they hold the same images.

        Args:
            images: The images of each row; they are kept without their pixels.
        """
        if not any(images):
            return self
        keys, sequences = self.input_ids.copy(), []
        for row, (ids, placed) in enumerate(zip(self.token_ids(), images, strict=True)):
            # The plan of a call is kept, its pixels are not.
            bare = [image._replace(image=replace(image.image, read=dict)) for image in placed]
            sequences.append(Sequence(ids, (False,) * len(ids), bare))
            keys[row, self.starts[row] : self.stops[row]] = sequences[-1].tree_ids
        return replace(self, keys=keys, sequences=tuple(sequences))

    def token_ids(self) -> list[list[int]]:
        """The real tokens of each row."""
        return [
            row[start:stop].tolist() for row, start, stop in zip(self.input_ids, self.starts, self.stops, strict=True)
        ]

    def num_shared_tokens(self, *, by_position: bool) -> int:
        """How many fewer tokens an unlimited prefix tree stores than the rows hold.

        In lexicographic order these are the prefixes that neighbours share.

        Args:
            by_position: Whether rows share tokens only where positions agree too.
        """
        columns = np.arange(self.input_ids.shape[1])
        if not self.starts.any():
            aligned = self.keys
        else:
            aligned = np.take_along_axis(self.keys, (columns + self.starts[:, None]) % len(columns), axis=1)
        keys = [
            (int(position) if by_position else 0, row[:length].tobytes())
            for position, row, length in zip(self.first_positions, aligned, self.lengths, strict=True)
        ]
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
        same = aligned[order[1:]] == aligned[order[:-1]]
        same &= columns < np.minimum(self.lengths[order[1:]], self.lengths[order[:-1]])[:, None]
        if by_position:
            same &= (self.first_positions[order[1:]] == self.first_positions[order[:-1]])[:, None]
        # The first difference ends a prefix; a row without one would give 0.
        prefixes = np.where(same.all(axis=1), len(columns), same.argmin(axis=1))
        return int(prefixes.sum())

    def tree_ids(self, *, by_position: bool) -> list[np.ndarray]:
        """The comparison ids of each row's real tokens; with `by_position`, rows at other positions share nothing."""
        rows = [row[start:stop].copy() for row, start, stop in zip(self.keys, self.starts, self.stops, strict=True)]
        if by_position:
            numbers: dict[tuple[int, int], int] = {}
            for row, position in zip(rows, self.first_positions.tolist(), strict=True):
                place = (position, int(row[0]))
                row[0] = _FIRST_MARK + numbers.setdefault(place, len(numbers))
        return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedRows:
    """The unique tokens of a padded batch as one pass, and the mapping back.

    Attributes:
        item: The pass: all levels of the prefix tree in one row of U tokens.
        unique_rows: (B * L,) int64, for every cell the row of the pass that computes it; U for padding.
        shape: B and L.
        num_unique_tokens: U.
        max_row_tokens: Real tokens of the longest row.
        sequences: Per row its tokens and images, without pixels; empty if no row has images.
        images: The images whose features the pass reads, in order.
    """

    item: PassPlan
    unique_rows: torch.Tensor
    shape: tuple[int, int]
    num_unique_tokens: int
    max_row_tokens: int
    sequences: tuple[Sequence, ...] = field(default=(), metadata=STAYS_ON_THE_HOST)
    images: tuple[Image, ...] = field(default=(), metadata=STAYS_ON_THE_HOST)


def share_rows(
    rows: PaddedRows, *, by_position: bool, min_shared_tokens: int, max_depth: int, spans: str = "none"
) -> SharedRows:
    """Plan one pass over the unique tokens of `rows`; tensors on the CPU.

    One pass for all levels, so that each layer runs once per call, as in the unchanged model.

    Args:
        rows: The padded batch.
        by_position: Whether rows share tokens only where positions agree too. Without it, positions count from each
            row's first token, which makes no difference to a model that reads only distances.
        min_shared_tokens: Shorter shared runs are repeated, as in `kvpref.prefix.building.build_tree`.
        max_depth: Depth of the deepest segment.
        spans: Which tokens the model lets see one another in both directions, as in `kvpref.plan.passes.Reads`.
    """
    tree = build_tree(rows.tree_ids(by_position=by_position), min_shared_tokens=min_shared_tokens, max_depth=max_depth)
    # Not the whole layout, which needs scored tokens: these are unknown here.
    levels = build_levels(tree, Reads(spans=spans).runs(rows.sequences) if rows.sequences else None)
    unique_rows, cells = _match_cells(tree, levels, rows)
    table = shared_table(rows.sequences)
    image_rows, image_index, runs = _place_images(tree, levels, table)
    first_positions = rows.first_positions if by_position else np.zeros_like(rows.starts)
    positions = np.arange(rows.input_ids.shape[1]) + (first_positions - rows.starts)[:, None]
    num_rows, num_columns = rows.input_ids.shape
    return SharedRows(
        item=PassPlan(
            # Ids of the batch: the tree's may encode positions or stand for images.
            input_ids=pass_input_ids(rows.input_ids.reshape(-1)[cells], image_rows).unsqueeze(0),
            position_ids=torch.from_numpy(positions.reshape(-1)[cells]).unsqueeze(0),
            attention_mask=None,
            levels=tuple(map(level_blocks, levels)),
            predictor_rows=int64(()),
            layouts=tuple(level.placed for level in levels),
            segments=level_segments(tree, levels),
            image_rows=image_rows,
            image_index=image_index,
            row_runs=runs,
        ),
        unique_rows=torch.from_numpy(unique_rows),
        shape=(num_rows, num_columns),
        num_unique_tokens=len(cells),
        max_row_tokens=int(rows.lengths.max()),
        sequences=rows.sequences,
        images=table.images,
    )


def _place_images(
    tree: PrefixTree, levels: tuple[LevelSegments, ...], table: ImageTable
) -> tuple[torch.Tensor, torch.Tensor, tuple[RowRun, ...]]:
    """Image rows and index of the pass, and which tokens its rows hold."""
    if not table.images:
        return int64(()), int64(()), ()
    holders = tree.sources.tolist()
    rows_of = feature_rows(tree, table.runs)
    inside = first_rows(tree).tolist()
    placed: list[tuple[int, int]] = []
    runs: list[RowRun] = []
    num_rows = 0
    for level in levels:
        for index in level.segments:
            first = num_rows + inside[index]
            placed += [(first + offset, row) for offset, row in rows_of.get(index, ())]
        runs += row_runs(level, [holders[index] for index in level.segments])
        num_rows += level.num_rows
    return int64([row for row, _ in placed]), int64([index for _, index in placed]), tuple(runs)


def _match_cells(
    tree: PrefixTree, levels: tuple[LevelSegments, ...], rows: PaddedRows
) -> tuple[np.ndarray, np.ndarray]:
    """Per cell (B * L,) the row of the pass, U for padding; per row of the pass (U,) a cell that it computes."""
    num_unique, num_columns = tree.num_unique_tokens, rows.input_ids.shape[1]
    # A pass packs level after level.
    order = np.array([index for level in levels for index in level.segments])
    first = np.empty_like(order)
    first[order] = np.cumsum(tree.lengths[order]) - tree.lengths[order]
    held = tree.path_stops - tree.starts[tree.path_segments]
    along = ranges(first[tree.path_segments], held)
    own = ranges(np.arange(len(rows.starts)) * num_columns + rows.starts, rows.lengths)
    unique_rows = np.full(rows.input_ids.size, num_unique, dtype=np.int64)
    cells = np.empty(num_unique, dtype=np.int64)
    unique_rows[own], cells[along] = along, own
    return unique_rows, cells
