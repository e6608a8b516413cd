"""Collates planned micro-batches, in data workers or ahead of use in a thread."""

from __future__ import annotations

import contextlib

from torch.utils.data import Dataset, get_worker_info

from kvpref.data import MicroBatch, PreferenceDataset, RankStep
from kvpref.errors import InputError, RunError
from kvpref.losses import PreferenceLoss
from kvpref.plan.batch import ImageInputs, collate
from kvpref.plan.passes import Reads
from kvpref.plan.step import Step
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.loading.inputs import MicroBatchInputs, StepInputs, join_micro_batches
from kvpref.training.loading.prefetch import Prefetcher
from kvpref.training.loading.sending import FailedStep, SentStep


class StepDataset(Dataset[MicroBatchInputs]):
    """A preference dataset whose items are micro-batches: ``dataset[micro_batch]``.

    Args:
        groups: The groups that micro-batches refer to.
        args: Mode and sharing settings.
        ahead: Collate the next steps in a thread while the current one trains.
        reads: Which hidden states the loss reads; those for log-probs if None.
        loss: Prepares what else it reads of batches as they are collated; nothing if None.
    """

    def __init__(
        self,
        groups: PreferenceDataset,
        args: PreferenceTrainingArguments,
        *,
        ahead: bool = False,
        reads: Reads | None = None,
        loss: PreferenceLoss | None = None,
    ) -> None:
        self.groups = groups
        self.reads = reads
        self.loss = loss
        self.options = args.engine_options()
        self.shares = args.share_across_micro_batches
        self.min_shared_tokens = args.min_shared_tokens
        self.max_prefix_depth = args.max_prefix_depth
        self._prefetcher: Prefetcher[tuple[MicroBatch, ...], StepInputs] | None = None
        if ahead:
            self._prefetcher = Prefetcher()
        self._pins = pins_memory(args)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, micro_batch: MicroBatch) -> MicroBatchInputs:
        batch = collate(
            [self.groups[index] for index in micro_batch.group_indices],
            modes=() if self.options.runs_chunks else (self.options.mode,),
            min_shared_tokens=self.min_shared_tokens,
            max_depth=self.max_prefix_depth,
            reads=self.reads,
        )
        if self.loss is not None:
            with contextlib.suppress(InputError):  # the loss will raise it again where the user sees it
                self.loss.prepare_batch(batch)
        return MicroBatchInputs(batch=batch, group_indices=micro_batch.group_indices, is_filler=micro_batch.is_filler)

    def __getitems__(self, step: RankStep) -> StepInputs | SentStep | FailedStep:
        """The micro-batches of a whole step; DataLoader calls this with the items of the batch sampler."""
        if get_worker_info() is not None:
            return self._send(step)
        if self._prefetcher is None:
            return self._collate_step(step)
        return self._prefetcher.get(self._collate_and_pin, step, step.following)

    def _send(self, step: RankStep) -> SentStep | FailedStep:
        try:
            return SentStep(self._collate_step(step), pins=self._pins)
        except (InputError, RunError) as error:  # any other error keeps its traceback
            return FailedStep(error)

    def _collate_and_pin(self, step: tuple[MicroBatch, ...]) -> StepInputs:
        inputs = self._collate_step(step)
        return inputs.pin_memory() if self._pins else inputs

    def _collate_step(self, step: tuple[MicroBatch, ...]) -> StepInputs:
        micro_batches = tuple(self[micro_batch] for micro_batch in step)
        images: dict[str, ImageInputs] = {}
        for item in micro_batches:
            images.update(item.batch.image_inputs(images))
        joined: tuple[Step, ...] = ()
        if self.options.runs_chunks:
            joined = join_micro_batches([item.batch for item in micro_batches], self.options, shares=self.shares)
        return StepInputs(micro_batches=micro_batches, joined=joined)


def collates_ahead(args: PreferenceTrainingArguments) -> bool:
    """Whether a thread collates ahead: unless data workers do."""
    return args.dataloader_num_workers == 0


def pins_memory(args: PreferenceTrainingArguments) -> bool:
    """Whether batches are put in page-locked memory, from which copies to CUDA do not block the host."""
    return bool(args.dataloader_pin_memory) and args.device.type == "cuda"
