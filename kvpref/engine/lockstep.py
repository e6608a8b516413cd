"""Equally many passes on all ranks, needed because each pass gathers sharded weights.

A rank with fewer chunks than another runs dummy chunks of one token, whose output gets a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from kvpref.engine.chunk_program import ChunkOutput, ChunkSettings, run_chunk
from kvpref.engine.options import EngineOptions
from kvpref.parallel.agreement import agreement
from kvpref.parallel.plain import Wrapper
from kvpref.plan.chunks import StepChunks, build_step_chunks
from kvpref.plan.sharing import Sharing
from kvpref.records.groups import Sequence as TokenSequence
from kvpref.records.requests import HeadOptions
from kvpref.records.tensor_fields import tensors_to
from kvpref.state.slabs import SlabStore
from kvpref.tracing import region


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The number of passes that a list of chunks takes."""

    forward: int
    """First forward passes, one per chunk."""

    backward: int = 0

    kept: int = 0
    """Backward passes that use the graph of the first forward pass; the others run forward once more."""


class Lockstep:
    """Runs the passes that other ranks have and this one does not.

    Args:
        wrapper: The model, possibly wrapped.
        device: The model's device.
        options: How chunks run.
        head: What the head computes.
    """

    def __init__(self, wrapper: Wrapper, device: torch.device, options: EngineOptions, head: HeadOptions) -> None:
        self._wrapper, self._device, self._options, self._head = wrapper, device, options, head

    def agree(self, own: Sequence[Rounds]) -> list[Rounds]:
        """The rounds that all ranks run.

        Args:
            own: This rank's rounds, for as many parts as on every other rank.
        """
        if not self._wrapper.is_lockstep:
            return list(own)
        counts = [count for rounds in own for count in (rounds.forward, rounds.backward, -rounds.kept)]
        most = agreement().most(counts)
        return [
            Rounds(forward=most[index], backward=most[index + 1], kept=-most[index + 2])
            for index in range(0, len(most), 3)
        ]

    @torch.no_grad()
    def forward(self, count: int) -> None:
        """Run `count` dummy forward passes."""
        for _ in range(count):
            with region("dummy pass"):
                self._run()

    def backward(self, count: int) -> None:
        """Run `count` dummy forward passes with a graph, each followed by its backward pass."""
        for _ in range(count):
            with torch.enable_grad(), region("dummy pass"):
                anchor = self._run().anchor
                assert anchor is not None
                (anchor * 0).backward()

    def _run(self) -> ChunkOutput:
        chunks, settings = self._dummy
        (chunk,) = chunks.all
        store = SlabStore(chunks, self._device, on_host=False, prompts_get_grad=False)
        program = partial(run_chunk, chunk=chunk, key_values=store.key_values(chunk), settings=settings)
        return self._wrapper.run_chunk(program)

    @cached_property
    def _dummy(self) -> tuple[StepChunks, ChunkSettings]:
        """A chunk of one token that predicts nothing."""
        sequence = TokenSequence(input_ids=(0,), scored=(False,))
        tree = Sharing().tree([sequence])
        chunks = tensors_to(build_step_chunks([[sequence]], tree, max_tokens=None), self._device)
        settings = ChunkSettings(
            num_positions=1,
            options=replace(self._options, router_aux_loss_coef=None),
            head=self._head,
            adds_in_place=self._wrapper.adds_in_place,
            needs_output=True,
        )
        return chunks, settings
