"""Forward passes as tensors, and the indices that lead from their hidden rows to scored tokens.

Shape legend: B rows of T tokens in one forward pass, P_i predictor rows of pass i, U = sum of P_i unique scored
tokens, S scored tokens over all sequences, M rows of a pass that stand for images.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from kvpref.ops.attention.block import VarlenBlock
from kvpref.prefix.blocks import PlacedBlocks
from kvpref.prefix.rules import CAUSAL, Rule
from kvpref.prefix.runs import Runs
from kvpref.prefix.segments import SegmentLayout
from kvpref.prefix.shapes import blocks_under
from kvpref.records.groups import BoolArray, IntArray, Sequence
from kvpref.records.images import Image
from kvpref.records.requests import READS, SPANS
from kvpref.records.tensor_fields import STAYS_ON_THE_HOST

RowRun = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelBlocks:
    """The attention blocks of one level inside a pass: `num_rows` rows over themselves, then over prefixes."""

    num_rows: int
    blocks: tuple[VarlenBlock, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PassPlan:
    """One forward of the model's layers.

    Attributes:
        input_ids: (B, T) int64; 0 where a row stands for an image.
        position_ids: (B, T) int64, positions inside the sequences.
        attention_mask: (B, T) int64, 1 for tokens and 0 for padding; only in mode ``padded``.
        levels: The levels packed in this row, one after another, under the causal rule; empty in mode ``padded``.
        predictor_rows: (P,) int64, rows of the flattened (B * T) hidden states that predict scored tokens.
        layouts: The integer layouts that `levels` were made from.
        segments: Per level, where its segments begin and which states they leave, for layers that carry a state from
            token to token; empty if the pass was planned without.
        image_rows: (M,) int64, the rows of the flattened (B * T) embeddings that features of images replace.
        image_index: (M,) int64, the rows of the plan's table of features that replace them.
        row_runs: Which tokens its rows hold, as runs (sequence, first position, position after the last). Only if
            the plan has images and the pass has one row.
        spans_of_rows: Per row, the runs of tokens that see one another in both directions; only in mode ``padded``, and
            empty where there are none.
        predictor_rows_on_host: `predictor_rows` on the device where the pass was planned.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    levels: tuple[LevelBlocks, ...]
    predictor_rows: torch.Tensor
    layouts: tuple[PlacedBlocks, ...] = field(repr=False, metadata=STAYS_ON_THE_HOST)
    segments: tuple[SegmentLayout, ...] = field(default=(), repr=False, metadata=STAYS_ON_THE_HOST)
    image_rows: torch.Tensor = field(default_factory=lambda: int64(()))
    image_index: torch.Tensor = field(default_factory=lambda: int64(()))
    row_runs: tuple[RowRun, ...] = field(default=(), repr=False, metadata=STAYS_ON_THE_HOST)
    spans_of_rows: tuple[Runs, ...] = field(default=(), repr=False, metadata=STAYS_ON_THE_HOST)
    predictor_rows_on_host: torch.Tensor | None = field(default=None, repr=False, metadata=STAYS_ON_THE_HOST)
    _under: dict[Rule, tuple[LevelBlocks, ...]] = field(
        init=False, repr=False, default_factory=dict, metadata=STAYS_ON_THE_HOST
    )

    def __post_init__(self) -> None:
        if self.predictor_rows_on_host is None:
            object.__setattr__(self, "predictor_rows_on_host", self.predictor_rows)

    def levels_under(self, rule: Rule) -> tuple[LevelBlocks, ...]:
        """The levels under another layer rule, on the device of this pass; planned when first asked for.

        Blocks that the rule does not change stay the same objects; under `CAUSAL` that is all of them.
        """
        if rule == CAUSAL:
            return self.levels
        if rule not in self._under:
            # Called while the model runs, possibly on fake tensors or in inference mode, whose tensors no later
            # backward pass may read.
            with unset_fake_temporarily(), torch.inference_mode(False):
                pairs = zip(self.layouts, self.levels, strict=True)
                self._under[rule] = tuple(
                    _blocks_under(layout, level, rule, self.input_ids.device) for layout, level in pairs
                )
        return self._under[rule]


@dataclass(frozen=True, kw_only=True, eq=False)
class ModePlan:
    """All passes of a mode for one micro-batch.

    Attributes:
        mode: Name of the mode.
        passes: In the order in which they run.
        targets: (U,) int64, the token each predictor row predicts, pass after pass.
        token_index: (S,) int64, index into the U unique scored tokens, sequence after sequence.
        cu_seqlens: (num_sequences + 1,) int64, offsets of each sequence in `token_index`.
        max_sequence_tokens: Length of the longest sequence.
        num_forward_tokens: Tokens that run through the layers, padding included.
        images: The images whose features are the rows of the table that its passes read, in order: each image once,
            or once per sequence in modes that repeat prompts.
    """

    mode: str
    passes: tuple[PassPlan, ...]
    targets: torch.Tensor
    token_index: torch.Tensor
    cu_seqlens: torch.Tensor
    max_sequence_tokens: int
    num_forward_tokens: int
    images: tuple[Image, ...] = field(default=(), repr=False, metadata=STAYS_ON_THE_HOST)


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Which hidden states of a model a loss reads, and which tokens the model's tokens see."""

    kind: str = "tokens"
    """``tokens``: those that predict scored tokens, for log-probs. ``ends``: that of each last token, for a reward."""

    pad_token_id: int | None = None
    """``ends``: trailing tokens with this id are skipped, as transformers' reward models do."""

    spans: str = "none"
    """Which runs of tokens the model lets see one another in both directions; one of `SPANS`."""

    states: bool = False
    """Whether layers carry a state from token to token."""

    def __post_init__(self) -> None:
        if self.kind not in READS:
            raise ValueError(f"unknown reads {self.kind!r}; choose from: {', '.join(READS)}")
        if self.spans not in SPANS:
            raise ValueError(f"unknown spans {self.spans!r}; choose from: {', '.join(SPANS)}")

    def flags(self, sequences: AbstractSequence[Sequence]) -> list[BoolArray]:
        """Flags of the tokens whose predictors are read, in the form `build_layout` takes."""
        if self.kind == "tokens":
            return [sequence.flags for sequence in sequences]
        return [self._end_flags(sequence.ids) for sequence in sequences]

    def runs(self, sequences: AbstractSequence[Sequence]) -> list[Runs] | None:
        """Per sequence the runs that see both ways, in the form `build_layout` takes."""
        if self.spans == "none":
            return None
        return [sequence.image_runs if self.spans == "images" else sequence.prompt_runs for sequence in sequences]

    def _end_flags(self, ids: IntArray) -> BoolArray:
        flags = np.zeros(len(ids) + 1, dtype=bool)
        real = () if self.pad_token_id is None else np.flatnonzero(ids != self.pad_token_id)
        last = len(ids) - 1 if self.pad_token_id is None else max(real, default=0)
        flags[last + 1] = True
        return flags


def int64(values: AbstractSequence[int] | IntArray | BoolArray) -> torch.Tensor:
    """Numbers as an int64 tensor; shares a writable array's memory."""
    numbers = np.ascontiguousarray(values, dtype=np.int64)
    return torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy())


def level_blocks(level: PlacedBlocks) -> LevelBlocks:
    """The attention blocks of a level under the causal rule as tensors."""
    return LevelBlocks(
        num_rows=level.num_rows,
        blocks=tuple(VarlenBlock.from_layout(block) for block in (level.self_block, *level.cross_blocks)),
    )


def _blocks_under(layout: PlacedBlocks, level: LevelBlocks, rule: Rule, device: torch.device) -> LevelBlocks:
    known = dict(zip((layout.self_block, *layout.cross_blocks), level.blocks, strict=True))
    return LevelBlocks(
        num_rows=level.num_rows,
        blocks=tuple(
            known.get(block) or VarlenBlock.from_layout(block, device) for block in blocks_under(layout, rule)
        ),
    )


def pass_input_ids(input_ids: AbstractSequence[int] | IntArray, image_rows: torch.Tensor) -> torch.Tensor:
    """(T,) int64, with 0 for image placeholders, which some models have no embedding for and none uses."""
    ids = int64(input_ids)
    return ids.index_fill_(0, image_rows, 0) if len(image_rows) else ids


def row_runs(layout: PlacedBlocks, holders: AbstractSequence[int]) -> Iterator[RowRun]:
    """Which tokens the rows of a level or chunk hold, run by run."""
    lengths = (stop - start for start, stop in pairwise(layout.self_block.cu_seqlens_q))
    for holder, first, length in zip(holders, layout.query_positions, lengths, strict=True):
        yield holder, first, first + length
