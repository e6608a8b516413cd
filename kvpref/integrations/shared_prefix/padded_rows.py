"""A padded batch as a prefix tree: which tokens its rows share, and the way back to rows and columns.

Integers only, on the CPU. Shape legend: B rows of L columns, U unique tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from kvpref.plan.passes import PassPlan, int64, level_blocks
from kvpref.prefix.levels import LevelSegments, build_levels
from kvpref.prefix.segments import level_segments
from kvpref.prefix.tree import PrefixTree, TokenIds, build_tree

# Token ids stand below it, positions above, where both make one number.
_POSITION_UNIT = 1 << 32


class UnservedError(Exception):
    """A call that the model has to run unchanged; the message is the reason, in a few words."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedRows:
    """Where the real tokens of a padded batch stand: one run of columns per row.

    Attributes:
        input_ids: (B, L) int64.
        starts: (B,) int64, column of each row's first real token.
        stops: (B,) int64, column after its last one.
        first_positions: (B,) int64, position of its first real token; the others count on from there.
    """

    input_ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    first_positions: np.ndarray

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
            attention_mask: (B, L), 1 for real tokens and 0 for padding; None where all are real.
            position_ids: (B, L) or (1, L); None for columns as positions.

        Raises:
            UnservedError: If a row's real tokens are not one run, or their positions do not count up by one.
        """
        num_columns = input_ids.shape[1]
        real = np.ones(input_ids.shape, dtype=bool) if attention_mask is None else attention_mask == 1
        if attention_mask is not None and not (real | (attention_mask == 0)).all():
            raise UnservedError("attention_mask holds other values than 0 and 1")
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
        return cls(input_ids=input_ids, starts=starts, stops=stops, first_positions=first_positions)

    def num_shared_tokens(self, *, by_position: bool) -> int:
        """Tokens that a prefix tree without limits stores less than the rows hold.

        In lexicographic order these are the prefixes that neighbours share.

        Args:
            by_position: Whether rows share tokens only where positions agree too.
        """
        columns = np.arange(self.input_ids.shape[1])
        if not self.starts.any():
            aligned = self.input_ids
        else:
            aligned = np.take_along_axis(self.input_ids, (columns + self.starts[:, None]) % len(columns), axis=1)
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

    def sequences(self, *, by_position: bool) -> list[TokenIds]:
        """The real tokens of each row; with `by_position` marked so that rows at other positions share nothing."""
        rows = [
            tuple(row[start:stop].tolist())
            for row, start, stop in zip(self.input_ids, self.starts, self.stops, strict=True)
        ]
        if not by_position:
            return rows
        marks = (self.first_positions * _POSITION_UNIT).tolist()
        return [(row[0] + mark, *row[1:]) for row, mark in zip(rows, marks, strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedRows:
    """The unique tokens of a padded batch as one pass, and the way back.

    Attributes:
        item: The pass: all levels of the prefix tree in one row of U tokens.
        unique_rows: (B * L,) int64, for every cell the row of the pass that computes it; U for padding.
        shape: B and L.
        num_unique_tokens: U.
        max_row_tokens: Real tokens of the longest row.
    """

    item: PassPlan
    unique_rows: torch.Tensor
    shape: tuple[int, int]
    num_unique_tokens: int
    max_row_tokens: int


def share_rows(rows: PaddedRows, *, by_position: bool, min_shared_tokens: int, max_depth: int) -> SharedRows:
    """Plan one pass over the unique tokens of `rows`; tensors on the CPU.

    One for all levels, so that each layer runs once per call, as it does in the unchanged model.

    Args:
        rows: The padded batch.
        by_position: Whether rows share tokens only where positions agree too. Without it, positions count from each
            row's first token, which is the same to a model that reads only distances.
        min_shared_tokens: Shorter shared runs are repeated, as in `kvpref.prefix.tree.build_tree`.
        max_depth: Depth of the deepest segment.
    """
    tree = build_tree(rows.sequences(by_position=by_position), min_shared_tokens=min_shared_tokens, max_depth=max_depth)
    # Not the whole layout: of scored tokens, which it lays out one by one, nothing is known here.
    levels = build_levels(tree)
    unique_rows, cells = _match_cells(tree, levels, rows)
    first_positions = rows.first_positions if by_position else np.zeros_like(rows.starts)
    positions = np.arange(rows.input_ids.shape[1]) + (first_positions - rows.starts)[:, None]
    num_rows, num_columns = rows.input_ids.shape
    return SharedRows(
        item=PassPlan(
            # Of the batch: those of the tree may be marked with positions.
            input_ids=torch.from_numpy(rows.input_ids.reshape(-1)[cells]).unsqueeze(0),
            position_ids=torch.from_numpy(positions.reshape(-1)[cells]).unsqueeze(0),
            attention_mask=None,
            levels=tuple(map(level_blocks, levels)),
            predictor_rows=int64(()),
            layouts=tuple(level.placed for level in levels),
            segments=level_segments(tree, levels),
        ),
        unique_rows=torch.from_numpy(unique_rows),
        shape=(num_rows, num_columns),
        num_unique_tokens=len(cells),
        max_row_tokens=int(rows.lengths.max()),
    )


def _match_cells(
    tree: PrefixTree, levels: tuple[LevelSegments, ...], rows: PaddedRows
) -> tuple[np.ndarray, np.ndarray]:
    """Per cell (B * L,) the row of the pass, U for padding; per row of the pass (U,) a cell that it computes."""
    num_unique, num_columns = tree.num_unique_tokens, rows.input_ids.shape[1]
    # A pass packs level after level.
    order = [index for level in levels for index in level.segments]
    offsets = accumulate((len(tree.segments[index]) for index in order), initial=0)
    spans = {
        index: np.arange(start, start + len(tree.segments[index])) for index, start in zip(order, offsets, strict=False)
    }
    unique_rows = np.full(rows.input_ids.size, num_unique, dtype=np.int64)
    cells = np.empty(num_unique, dtype=np.int64)
    for index, path in enumerate(tree.paths):
        own = index * num_columns + np.arange(rows.starts[index], rows.stops[index])
        along = np.concatenate([spans[segment] for segment in path])
        unique_rows[own], cells[along] = along, own
    return unique_rows, cells
