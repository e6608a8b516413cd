"""Chunks as tensors: what the bounded schedule runs, one forward pass after another.

Shape legend: T tokens of a chunk, V distinct ones, P its predictor rows, U unique scored tokens of all micro-batches, S
scored tokens over the sequences of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from kvpref.plan.images import shared_table
from kvpref.plan.passes import (
    PassPlan,
    Reads,
    int64,
    level_blocks,
    pass_input_ids,
    row_runs,
)
from kvpref.prefix.chunks import Chunk, build_chunks
from kvpref.prefix.levels import build_layout, cut_prompts
from kvpref.prefix.occurrences import Occurrences
from kvpref.prefix.segments import NO_STATES
from kvpref.prefix.slab_reads import SHARED, SlabKey
from kvpref.prefix.tree import PrefixTree
from kvpref.records.groups import IntArray, Sequence
from kvpref.records.images import Image
from kvpref.records.tensor_fields import STAYS_ON_THE_HOST


@dataclass(frozen=True, kw_only=True)
class SlabSlice:
    """The rows [start, stop) of a slab."""

    slab: SlabKey
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkPlan:
    """One forward pass of the bounded schedule.

    Attributes:
        item: The pass; its only level reads each slice in `reads` as a prefix.
        reads: The keys and values that it reads.
        writes: Where its own T keys and values go; None if they are not read later.
        state_reads: In layers that carry a state from token to token, the states that its segments start from.
        state_writes: Where the final states of its segments go; None if they are not read later.
        unique_ids: (V,) int64, the distinct token ids.
        inverse: (T,) int64, each token's index into `unique_ids`.
        depth: The depth of its segments.
        is_prompt: Whether its segments are prompts without a gradient.
        targets: (P,) int64, the tokens predicted by its predictor rows.
        logp_index: (P,) int64, the place of their log-probs among the U.
        known_occurrences: As `occurrences`; None where they are not counted.
    """

    item: PassPlan
    reads: tuple[SlabSlice, ...]
    writes: SlabSlice | None
    state_reads: tuple[SlabSlice, ...]
    state_writes: SlabSlice | None
    unique_ids: torch.Tensor
    inverse: torch.Tensor
    depth: int
    is_prompt: bool
    targets: torch.Tensor
    logp_index: torch.Tensor
    known_occurrences: Occurrences | None = field(metadata=STAYS_ON_THE_HOST, repr=False)

    @property
    def occurrences(self) -> Occurrences:
        """How often its rows occur in the sequences of each micro-batch.

        Raises:
            ValueError: If the step was joined without.
        """
        if self.known_occurrences is None:
            raise ValueError("the step was joined with counts_occurrences=False; join it again without")
        return self.known_occurrences

    @property
    def num_tokens(self) -> int:
        return self.item.input_ids.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatchChunks:
    """The chunks needed by one micro-batch alone, and the indices that gather its log-probs.

    Attributes:
        chunks: The chunks in the order in which they run.
        token_index: (S,) int64, index into the U unique scored tokens, sequence after sequence.
        cu_seqlens: (num_sequences + 1,) int64, offsets of each sequence in `token_index`.
    """

    chunks: tuple[ChunkPlan, ...]
    token_index: torch.Tensor
    cu_seqlens: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class StepChunks:
    """All forward passes of one optimizer step.

    Attributes:
        shared: Chunks of segments that several micro-batches share; they run before all others.
        micro_batches: What else each micro-batch needs.
        slab_rows: Number of rows of each slab.
        slab_states: Number of states of each slab.
        num_logps: U, the number of unique scored tokens.
        max_sequence_tokens: Length of the longest sequence.
        longest_span: Tokens of the longest run that is not cut because its tokens see later ones; 0 if there is none.
        images: The images whose features are the rows of the table that the passes read, in order; each image once.
    """

    shared: tuple[ChunkPlan, ...]
    micro_batches: tuple[MicroBatchChunks, ...]
    slab_rows: Mapping[SlabKey, int] = field(repr=False)
    slab_states: Mapping[SlabKey, int] = field(repr=False)
    num_logps: int
    max_sequence_tokens: int
    images: tuple[Image, ...] = field(default=(), repr=False, metadata=STAYS_ON_THE_HOST)
    longest_span: int = 0

    @property
    def all(self) -> tuple[ChunkPlan, ...]:
        """All chunks: the shared ones, then those of each micro-batch."""
        own = (chunk for micro_batch in self.micro_batches for chunk in micro_batch.chunks)
        return (*self.shared, *own)

    @property
    def max_chunk_tokens(self) -> int:
        return max(chunk.num_tokens for chunk in self.all)

    def num_tokens_by_micro_batch(self) -> list[int]:
        """Tokens of each micro-batch's chunks; shared ones count for the first."""
        counts = [sum(chunk.num_tokens for chunk in micro_batch.chunks) for micro_batch in self.micro_batches]
        counts[0] += sum(chunk.num_tokens for chunk in self.shared)
        return counts


def build_step_chunks(
    micro_batches: AbstractSequence[AbstractSequence[Sequence]],
    tree: PrefixTree,
    *,
    max_tokens: int | None,
    prefix_grad: bool = True,
    reads: Reads | None = None,
    counts_occurrences: bool = True,
) -> StepChunks:
    """Plan the chunks of an optimizer step; tensors on the CPU.

    Args:
        micro_batches: The sequences of each micro-batch.
        tree: The prefix tree over all of them, in order.
        max_tokens: Most tokens of a chunk; None for one chunk per depth. A run of tokens that see one another in both
            directions is never cut, however long it is.
        prefix_grad: False puts prompts, the tokens before the first scored one, into chunks of their own, because they
            get no gradient. They are cut from responses even where nothing is shared: what gets a gradient must not
            depend on whether responses happen to begin alike.
        reads: As in `kvpref.plan.modes.build_plan`.
        counts_occurrences: As in `kvpref.plan.step.join_batches`.
    """
    sequences = [sequence for several in micro_batches for sequence in several]
    scored = [sequence.flags for sequence in sequences]
    owners = [index for index, several in enumerate(micro_batches) for _ in several]
    if not prefix_grad:
        tree = cut_prompts(tree, scored)
    table = shared_table(sequences)
    reads = reads or Reads()
    spans = reads.runs(sequences)
    layout = build_layout(tree, reads.flags(sequences), spans, table.runs)
    cut = build_chunks(
        tree,
        layout,
        owners,
        max_tokens=max_tokens,
        scored=None if prefix_grad else scored,
        spans=spans,
        images=table.runs,
        counts_occurrences=counts_occurrences,
    )
    distinct = _DistinctIds(max(int(level.input_ids.max()) for level in layout.levels))
    plan = partial(_chunk_plan, has_images=bool(table.images), distinct=distinct)
    own = []
    first = 0
    for owner, several in enumerate(micro_batches):
        offsets = layout.cu_seqlens[first : first + len(several) + 1]
        own.append(
            MicroBatchChunks(
                chunks=tuple(map(plan, cut.chunks.get(owner, ()))),
                token_index=int64(layout.token_index[offsets[0] : offsets[-1]]),
                cu_seqlens=int64(offsets - offsets[0]),
            )
        )
        first += len(several)
    return StepChunks(
        shared=tuple(map(plan, cut.chunks.get(SHARED, ()))),
        micro_batches=tuple(own),
        slab_rows=dict(cut.slab_rows),
        slab_states=dict(cut.slab_states),
        num_logps=sum(len(level.targets) for level in layout.levels),
        max_sequence_tokens=layout.max_position + 1,
        images=table.images,
        longest_span=max((stop - first for runs in spans or () for first, stop in runs), default=0),
    )


class _DistinctIds:
    """Finds the distinct token ids of each chunk without sorting them.

    Args:
        largest: The largest of all ids.
    """

    def __init__(self, largest: int) -> None:
        self._is_there = np.zeros(largest + 1, dtype=bool)
        self._numbers = np.empty(largest + 1, dtype=np.int64)

    def find(self, ids: IntArray) -> tuple[IntArray, IntArray]:
        """The distinct ids in order (V,), and for each id its place among them (T,)."""
        self._is_there[ids] = True
        unique = np.flatnonzero(self._is_there)
        self._is_there[unique] = False
        self._numbers[unique] = np.arange(len(unique))
        return unique, self._numbers[ids]


def _chunk_plan(chunk: Chunk, *, has_images: bool, distinct: _DistinctIds) -> ChunkPlan:
    placed = chunk.placed
    image_rows = int64(chunk.image_rows)
    input_ids = pass_input_ids(chunk.input_ids, image_rows)
    item = PassPlan(
        input_ids=input_ids.unsqueeze(0),
        position_ids=int64(chunk.position_ids).unsqueeze(0),
        attention_mask=None,
        levels=(level_blocks(placed),),
        predictor_rows=int64(chunk.predictor_rows),
        layouts=(placed,),
        segments=() if chunk.states is NO_STATES else (chunk.states.layout,),
        image_rows=image_rows,
        image_index=int64(chunk.image_index),
        row_runs=tuple(row_runs(placed, chunk.holders)) if has_images else (),
    )
    unique_ids, inverse = map(int64, distinct.find(input_ids.numpy()))
    writes = None
    if chunk.slab_start is not None:
        writes = SlabSlice(slab=chunk.slab, start=chunk.slab_start, stop=chunk.slab_start + len(chunk))
    first, num_states = chunk.states.first, len(chunk.states.layout.kept)
    left = SlabSlice(slab=chunk.slab, start=first, stop=first + num_states) if num_states else None
    return ChunkPlan(
        item=item,
        reads=tuple(SlabSlice(slab=read.slab, start=read.start, stop=read.stop) for read in chunk.reads),
        writes=writes,
        state_reads=tuple(SlabSlice(slab=slab, start=start, stop=stop) for slab, start, stop in chunk.states.reads),
        state_writes=left,
        unique_ids=unique_ids,
        inverse=inverse,
        depth=chunk.slab.depth,
        is_prompt=chunk.slab.is_prompt,
        targets=int64(chunk.targets),
        logp_index=int64(chunk.logp_index),
        known_occurrences=chunk.occurrences,
    )
