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
        group_indices: Where they stand in the dataset.
        is_filler: Run it with weight 0; it only keeps the ranks in step.
    """

    batch: Batch
    group_indices: tuple[int, ...]
    is_filler: bool

    def pin_memory(self, images: dict[str, ImageInputs] | None = None) -> MicroBatchInputs:
        """The same in page-locked memory; DataLoader calls this for what its workers send.

        Args:
            images: As in `Batch.pin_memory`.
        """
        return replace(self, batch=self.batch.pin_memory(images))


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInputs:
    """What one rank runs in one batched step.

    Attributes:
        micro_batches: In the order in which they run.
        joined: The same for the bounded schedule, in the same order: one `Step` of all of them, or one of each where
            nothing is shared between them. Empty in schedule ``full``.
    """

    micro_batches: tuple[MicroBatchInputs, ...]
    joined: tuple[Step, ...] = ()

    def __iter__(self) -> Iterator[MicroBatchInputs]:
        return iter(self.micro_batches)

    def pin_memory(self) -> StepInputs:
        """The same in page-locked memory; images that several parts show are there once."""
        images: dict[str, ImageInputs] = {}
        return StepInputs(
            micro_batches=tuple(item.pin_memory(images) for item in self.micro_batches),
            joined=tuple(step.pin_memory(images) for step in self.joined),
        )


def join_micro_batches(batches: Sequence[Batch], options: EngineOptions, *, shares: bool) -> tuple[Step, ...]:
    """Plan the bounded schedule of a step: as one, or each micro-batch by itself."""
    parts = [batches] if shares else [[batch] for batch in batches]
    return tuple(
        join_batches(part, max_tokens_per_chunk=options.chunk_tokens, prefix_grad=options.prefix_grad) for part in parts
    )
