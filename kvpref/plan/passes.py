"""What each mode runs: forward passes as tensors, and the way from their hidden rows to scored tokens.

Shape legend: B rows of T tokens in one forward pass, P_i predictor rows of pass i, U = sum of P_i unique scored
tokens, S scored tokens over all sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from kvpref.ops.attention.block import VarlenBlock
from kvpref.prefix.levels import Level, LevelLayout, PlacedBlocks, build_layout
from kvpref.prefix.rules import CAUSAL, Rule
from kvpref.prefix.segments import SegmentLayout, level_segments
from kvpref.prefix.shapes import blocks_under
from kvpref.prefix.tree import PrefixTree, build_unshared_tree
from kvpref.records.groups import Sequence
from kvpref.records.requests import READS
from kvpref.records.tensor_fields import STAYS_ON_THE_HOST


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelBlocks:
    """The attention blocks of one level inside a pass: `num_rows` rows, over themselves first, then over prefixes."""

    num_rows: int
    blocks: tuple[VarlenBlock, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PassPlan:
    """One forward of the model's layers.

    Attributes:
        input_ids: (B, T) int64.
        position_ids: (B, T) int64, positions inside the sequences.
        attention_mask: (B, T) int64, 1 for tokens and 0 for padding; only in mode ``padded``.
        levels: The levels packed in this row, one after another, under the causal rule; empty in mode ``padded``.
        predictor_rows: (P,) int64, rows of the flattened (B * T) hidden states that predict scored tokens.
        layouts: What `levels` were made of, as integers.
        segments: Per level, where its segments begin and what they leave, for layers that carry a state from token to
            token; empty where the pass was planned without.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    levels: tuple[LevelBlocks, ...]
    predictor_rows: torch.Tensor
    layouts: tuple[PlacedBlocks, ...] = field(repr=False, metadata=STAYS_ON_THE_HOST)
    segments: tuple[SegmentLayout, ...] = field(default=(), repr=False, metadata=STAYS_ON_THE_HOST)
    _under: dict[Rule, tuple[LevelBlocks, ...]] = field(
        init=False, repr=False, default_factory=dict, metadata=STAYS_ON_THE_HOST
    )

    def levels_under(self, rule: Rule) -> tuple[LevelBlocks, ...]:
        """The levels as layers of another rule see them, on the device of this pass; planned when first asked for.

        Blocks that the rule leaves as they are stay the same objects, and so do all under `CAUSAL`.
        """
        if rule == CAUSAL:
            return self.levels
        if rule not in self._under:
            # Asked for while the model runs: on fake tensors, say, or in inference mode, whose tensors no later
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
    """

    mode: str
    passes: tuple[PassPlan, ...]
    targets: torch.Tensor
    token_index: torch.Tensor
    cu_seqlens: torch.Tensor
    max_sequence_tokens: int
    num_forward_tokens: int


Flags = AbstractSequence[AbstractSequence[bool]]


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Which hidden states a loss reads."""

    kind: str = "tokens"
    """``tokens``: those that predict scored tokens, for log-probs. ``ends``: that of each last token, for a reward."""

    pad_token_id: int | None = None
    """``ends``: tokens at the end that are this one are passed over, as transformers' reward models do."""

    def __post_init__(self) -> None:
        if self.kind not in READS:
            raise ValueError(f"unknown reads {self.kind!r}; choose from: {', '.join(READS)}")

    def flags(self, sequences: AbstractSequence[Sequence]) -> Flags:
        """The tokens whose predictors are read, as `build_layout` takes them."""
        if self.kind == "tokens":
            return [sequence.scored for sequence in sequences]
        return [self._end_flags(sequence.input_ids) for sequence in sequences]

    def _end_flags(self, input_ids: tuple[int, ...]) -> tuple[bool, ...]:
        last = next((i for i in reversed(range(len(input_ids))) if input_ids[i] != self.pad_token_id), 0)
        return (False,) * (last + 1) + (True,) + (False,) * (len(input_ids) - last - 1)


def build_plan(
    mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, reads: Reads | None = None
) -> ModePlan:
    """Plan the passes of `mode` over sequences whose shared prefixes are in `tree`; tensors on the CPU.

    Args:
        mode: One of `MODES`.
        sequences: What is run.
        tree: Over them.
        reads: Which hidden states are read; those for log-probs if None.

    Raises:
        ValueError: If there is no such mode.
    """
    if mode not in _BUILDERS:
        raise ValueError(f"unknown mode {mode!r}; choose from: {', '.join(MODES)}")
    return _BUILDERS[mode](mode, sequences, tree, (reads or Reads()).flags(sequences))


def int64(values: AbstractSequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


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


def _pass_of_levels(levels: AbstractSequence[Level], segments: tuple[SegmentLayout, ...]) -> PassPlan:
    """Pack whole levels, one after another, in one row."""
    predictor_rows: list[int] = []
    num_rows = 0
    for level in levels:
        predictor_rows.extend(num_rows + row for row in level.predictor_rows)
        num_rows += level.num_rows
    return PassPlan(
        input_ids=int64([token for level in levels for token in level.input_ids]).unsqueeze(0),
        position_ids=int64([position for level in levels for position in level.position_ids]).unsqueeze(0),
        attention_mask=None,
        levels=tuple(level_blocks(level) for level in levels),
        predictor_rows=int64(predictor_rows),
        layouts=tuple(level.placed for level in levels),
        segments=segments,
    )


def _plan_of_layout(mode: str, layout: LevelLayout, passes: tuple[PassPlan, ...]) -> ModePlan:
    return ModePlan(
        mode=mode,
        passes=passes,
        targets=int64([target for level in layout.levels for target in level.targets]),
        token_index=int64(layout.token_index),
        cu_seqlens=int64(layout.cu_seqlens),
        max_sequence_tokens=layout.max_position + 1,
        num_forward_tokens=sum(item.input_ids.numel() for item in passes),
    )


def _two_pass(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, flags: Flags) -> ModePlan:
    layout = build_layout(tree, flags)
    segments = level_segments(tree, layout.levels)
    passes = (_pass_of_levels([level], (own,)) for level, own in zip(layout.levels, segments, strict=True))
    return _plan_of_layout(mode, layout, tuple(passes))


def _one_pass(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, flags: Flags) -> ModePlan:
    layout = build_layout(tree, flags)
    return _plan_of_layout(mode, layout, (_pass_of_levels(layout.levels, level_segments(tree, layout.levels)),))


def _packed(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, flags: Flags) -> ModePlan:
    return _two_pass(mode, sequences, build_unshared_tree([sequence.input_ids for sequence in sequences]), flags)


def _padded(mode: str, sequences: AbstractSequence[Sequence], tree: PrefixTree, flags: Flags) -> ModePlan:
    width = max(len(sequence) for sequence in sequences)
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
    only_pass = PassPlan(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(sequences), -1),
        attention_mask=attention_mask,
        levels=(),
        predictor_rows=int64(rows),
        layouts=(),
    )
    return ModePlan(
        mode=mode,
        passes=(only_pass,),
        targets=int64(targets),
        token_index=torch.arange(len(targets)),
        cu_seqlens=int64(cu_seqlens),
        max_sequence_tokens=width,
        num_forward_tokens=input_ids.numel(),
    )


_BUILDERS: dict[str, Callable[[str, AbstractSequence[Sequence], PrefixTree, Flags], ModePlan]] = {
    "two_pass": _two_pass,
    "one_pass": _one_pass,
    "packed": _packed,
    "padded": _padded,
}

MODES = tuple(_BUILDERS)
