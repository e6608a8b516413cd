"""What one rank runs in one batched step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvpref.engine.options import EngineOptions
from kvpref.plan.batch import Batch, ImageInputs
from kvpref.plan.step import Step, join_batches


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatchInputs:
    """One collated micro-batch.

    Attributes:
        batch: Its groups.
        group_indices: Their indices in the dataset.
        is_filler: Whether it runs with weight 0, only to keep the ranks in step.
    """

    batch: Batch
    group_indices: tuple[int, ...]
    is_filler: bool

    def pin_memory(self, images: dict[str, ImageInputs] | None = None) -> MicroBatchInputs:
        """The same in page-locked memory; DataLoader calls this on what its workers send.

        Args:
            images: As for `Batch.pin_memory`.
        """
        return replace(self, batch=self.batch.pin_memory(images))


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInputs:
    """What one rank runs in one batched step.

    Attributes:
        micro_batches: The micro-batches in the order in which they run.
        joined: The same for the bounded schedule, in the same order: one `Step` of all of them, or one per
            micro-batch if nothing is shared between them. Empty in schedule ``full``.
    """

    micro_batches: tuple[MicroBatchInputs, ...]
    joined: tuple[Step, ...] = ()

    def __iter__(self) -> Iterator[MicroBatchInputs]:
        return iter(self.micro_batches)

    def num_forward_tokens(self, mode: str) -> int:
        """Tokens that run through the layers in a mode; in the bounded schedule, those of its plan."""
        if self.joined:
            return sum(sum(step.chunks.num_tokens_by_micro_batch()) for step in self.joined)
        return sum(item.batch.plan(mode).num_forward_tokens for item in self)

    def pin_memory(self) -> StepInputs:
        """The same in page-locked memory, with images that occur several times stored once."""
        images: dict[str, ImageInputs] = {}
        return StepInputs(
            micro_batches=tuple(item.pin_memory(images) for item in self.micro_batches),
            joined=tuple(step.pin_memory(images) for step in self.joined),
        )


def join_micro_batches(batches: Sequence[Batch], options: EngineOptions, *, shares: bool) -> tuple[Step, ...]:
    """Plan the bounded schedule of a step: as one, or each micro-batch by itself."""
    parts = [batches] if shares else [[batch] for batch in batches]
    return tuple(
        join_batches(
            part,
            max_tokens_per_chunk=options.chunk_tokens,
            prefix_grad=options.prefix_grad,
            counts_occurrences=options.router_aux_loss_coef is not None,
        )
        for part in parts
    )
