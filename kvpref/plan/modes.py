"""The passes of each mode."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence

import numpy as np
import torch

from kvpref.plan.images import ImageTable, repeated_table, shared_table
from kvpref.plan.passes import (
    ModePlan,
    PassPlan,
    Reads,
    int64,
    level_blocks,
    pass_input_ids,
    row_runs,
)
from kvpref.prefix.blocks import offsets
from kvpref.prefix.building import build_unshared_tree
from kvpref.prefix.levels import Level, LevelLayout, build_layout
from kvpref.prefix.segments import SegmentLayout, level_segments
from kvpref.prefix.tree import PrefixTree
from kvpref.records.groups import BoolArray, IntArray, Sequence
from kvpref.records.images import Image


def build_plan(
    mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads | None = None
) -> ModePlan:
    """Plan the passes of `mode` over sequences whose shared prefixes are in `tree`; tensors on the CPU.

    Args:
        mode: One of `MODES`.
        sequences: The sequences to run.
        tree: Their prefix tree.
        reads: Which hidden states are read and what tokens see; None for log-probs under causal attention.

    Raises:
        ValueError: If there is no such mode.
    """
    if mode not in _BUILDERS:
        raise ValueError(f"unknown mode {mode!r}; choose from: {', '.join(MODES)}")
    return _BUILDERS[mode](mode, sequences, tree, reads or Reads())


def _pass_of_levels(
    levels: AbstractSequence[Level], segments: tuple[SegmentLayout, ...], *, has_images: bool
) -> PassPlan:
    """Pack whole levels, one after another, in one row."""
    firsts = offsets(level.num_rows for level in levels)
    rows = int64([first + row for first, level in zip(firsts, levels, strict=False) for row in level.image_rows])
    predictors = [first + level.predictor_rows for first, level in zip(firsts, levels, strict=False)]
    return PassPlan(
        input_ids=pass_input_ids(np.concatenate([level.input_ids for level in levels]), rows).unsqueeze(0),
        position_ids=int64(np.concatenate([level.position_ids for level in levels])).unsqueeze(0),
        attention_mask=None,
        levels=tuple(level_blocks(level) for level in levels),
        predictor_rows=int64(np.concatenate(predictors)),
        layouts=tuple(level.placed for level in levels),
        segments=segments,
        image_rows=rows,
        image_index=int64([index for level in levels for index in level.image_index]),
        row_runs=tuple(run for level in levels for run in row_runs(level, level.holders)) if has_images else (),
    )


def _plan_of_layout(
    mode: str,
    layout: LevelLayout,
    passes: tuple[PassPlan, ...],
    images: tuple[Image, ...],
) -> ModePlan:
    return ModePlan(
        mode=mode,
        passes=passes,
        targets=int64(np.concatenate([level.targets for level in layout.levels])),
        token_index=int64(layout.token_index),
        cu_seqlens=int64(layout.cu_seqlens),
        max_sequence_tokens=layout.max_position + 1,
        num_forward_tokens=sum(item.input_ids.numel() for item in passes),
        images=images,
    )


def _two_pass(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads) -> ModePlan:
    return _level_passes(mode, sequences, tree, reads, shared_table(sequences))


def _level_passes(
    mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads, table: ImageTable
) -> ModePlan:
    layout = build_layout(tree, reads.flags(sequences), reads.runs(sequences), table.runs)
    segments = level_segments(tree, layout.levels)
    passes = (
        _pass_of_levels([level], segments[depth : depth + 1], has_images=bool(table.images))
        for depth, level in enumerate(layout.levels)
    )
    return _plan_of_layout(mode, layout, tuple(passes), table.images)


def _one_pass(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads) -> ModePlan:
    table = shared_table(sequences)
    layout = build_layout(tree, reads.flags(sequences), reads.runs(sequences), table.runs)
    segments = level_segments(tree, layout.levels)
    only_pass = _pass_of_levels(layout.levels, segments, has_images=bool(table.images))
    return _plan_of_layout(mode, layout, (only_pass,), table.images)


def _packed(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads) -> ModePlan:
    unshared = build_unshared_tree([sequence.ids for sequence in sequences])
    return _level_passes(mode, sequences, unshared, reads, repeated_table(sequences))


def _padded(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads) -> ModePlan:
    lengths = np.array(list(map(len, sequences)))
    width = int(lengths.max())
    is_token = np.arange(width) < lengths[:, None]
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    input_ids[is_token] = np.concatenate([sequence.ids for sequence in sequences])
    rows, places = _flagged(reads.flags(sequences))
    is_inside = places < lengths[rows]
    targets = np.where(is_inside, input_ids[rows, np.where(is_inside, places, 0)], 0)
    table = repeated_table(sequences)
    image_rows, image_index = _padded_images(table, width)
    ids = int64(input_ids)
    ids.view(-1)[image_rows] = 0
    only_pass = PassPlan(
        input_ids=ids,
        position_ids=torch.arange(width).expand(len(sequences), -1),
        attention_mask=int64(is_token),
        levels=(),
        predictor_rows=int64(rows * width + places - 1),
        layouts=(),
        image_rows=image_rows,
        image_index=image_index,
        spans_of_rows=tuple(reads.runs(sequences) or ()),
    )
    return ModePlan(
        mode=mode,
        passes=(only_pass,),
        targets=int64(targets),
        token_index=torch.arange(len(targets)),
        cu_seqlens=int64(np.searchsorted(rows, np.arange(len(sequences) + 1))),
        max_sequence_tokens=width,
        num_forward_tokens=input_ids.size,
        images=table.images,
    )


def _flagged(flags: AbstractSequence[BoolArray]) -> tuple[IntArray, IntArray]:
    """The sequence and the position of each flagged token."""
    found = [np.flatnonzero(own) for own in flags]
    return np.repeat(np.arange(len(found)), list(map(len, found))), np.concatenate(found)


def _padded_images(table: ImageTable, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    runs = [(number * width, run) for number, several in enumerate(table.runs) for run in several]
    rows = [start + position for start, run in runs for position in range(run.first, run.stop)]
    index = [run.row + offset for _, run in runs for offset in range(run.stop - run.first)]
    return int64(rows), int64(index)


_BUILDERS: dict[str, Callable[[str, AbstractSequence[Sequence], PrefixTree, Reads], ModePlan]] = {
    "two_pass": _two_pass,
    "one_pass": _one_pass,
    "packed": _packed,
    "padded": _padded,
}

MODES = tuple(_BUILDERS)
