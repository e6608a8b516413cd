"""The passes of each mode."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence

import torch

from kvpref.plan.images import ImageTable, repeated_table, shared_table
from kvpref.plan.passes import ModePlan, PassPlan, Reads, int64, level_blocks, pass_input_ids, row_runs
from kvpref.prefix.levels import Level, LevelLayout, build_layout
from kvpref.prefix.segments import SegmentLayout, level_segments
from kvpref.prefix.tree import PrefixTree, build_unshared_tree
from kvpref.records.groups import Sequence
from kvpref.records.images import Image


def build_plan(
    mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads | None = None
) -> ModePlan:
    """Plan the passes of `mode` over sequences whose shared prefixes are in `tree`; tensors on the CPU.

    Args:
        mode: One of `MODES`.
        sequences: What is run.
        tree: Over them.
        reads: Which hidden states are read, those for log-probs if None; and what tokens see.

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
    predictor_rows: list[int] = []
    image_rows: list[int] = []
    num_rows = 0
    for level in levels:
        predictor_rows.extend(num_rows + row for row in level.predictor_rows)
        image_rows.extend(num_rows + row for row in level.image_rows)
        num_rows += level.num_rows
    rows = int64(image_rows)
    return PassPlan(
        input_ids=pass_input_ids([token for level in levels for token in level.input_ids], rows).unsqueeze(0),
        position_ids=int64([position for level in levels for position in level.position_ids]).unsqueeze(0),
        attention_mask=None,
        levels=tuple(level_blocks(level) for level in levels),
        predictor_rows=int64(predictor_rows),
        layouts=tuple(level.placed for level in levels),
        segments=segments,
        image_rows=rows,
        image_index=int64([index for level in levels for index in level.image_index]),
        row_runs=tuple(run for level in levels for run in row_runs(level, level.holders)) if has_images else (),
    )


def _plan_of_layout(
    mode: str, layout: LevelLayout, passes: tuple[PassPlan, ...], images: tuple[Image, ...]
) -> ModePlan:
    return ModePlan(
        mode=mode,
        passes=passes,
        targets=int64([target for level in layout.levels for target in level.targets]),
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
        _pass_of_levels([level], (own,), has_images=bool(table.images))
        for level, own in zip(layout.levels, segments, strict=True)
    )
    return _plan_of_layout(mode, layout, tuple(passes), table.images)


def _one_pass(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads) -> ModePlan:
    table = shared_table(sequences)
    layout = build_layout(tree, reads.flags(sequences), reads.runs(sequences), table.runs)
    segments = level_segments(tree, layout.levels)
    only_pass = _pass_of_levels(layout.levels, segments, has_images=bool(table.images))
    return _plan_of_layout(mode, layout, (only_pass,), table.images)


def _packed(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads) -> ModePlan:
    unshared = build_unshared_tree([sequence.input_ids for sequence in sequences])
    return _level_passes(mode, sequences, unshared, reads, repeated_table(sequences))


def _padded(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads) -> ModePlan:
    width = max(len(sequence) for sequence in sequences)
    flags = reads.flags(sequences)
    table = repeated_table(sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    rows: list[int] = []
    targets: list[int] = []
    cu_seqlens = [0]
    for index, sequence in enumerate(sequences):
        input_ids[index, : len(sequence)] = int64(sequence.input_ids)
        attention_mask[index, : len(sequence)] = 1
        read = [position for position, flag in enumerate(flags[index]) if flag]
        rows.extend(index * width + position - 1 for position in read)
        targets.extend(sequence.input_ids[position] if position < len(sequence) else 0 for position in read)
        cu_seqlens.append(len(rows))
    image_rows, image_index = _padded_images(table, width)
    input_ids.view(-1)[image_rows] = 0
    only_pass = PassPlan(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(sequences), -1),
        attention_mask=attention_mask,
        levels=(),
        predictor_rows=int64(rows),
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
        cu_seqlens=int64(cu_seqlens),
        max_sequence_tokens=width,
        num_forward_tokens=input_ids.numel(),
        images=table.images,
    )


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
