"""The loader of batched steps."""

from __future__ import annotations

import multiprocessing
import pickle
from typing import Any

from torch.utils.data import DataLoader

from kvpref.data import PreferenceDataset, StepBatcher, StepSampler
from kvpref.losses import PreferenceLoss
from kvpref.plan.passes import Reads
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.loading.collation import StepDataset, collates_ahead, pins_memory
from kvpref.training.loading.inputs import StepInputs


def make_loader(
    groups: PreferenceDataset,
    batcher: StepBatcher,
    args: PreferenceTrainingArguments,
    *,
    reads: Reads | None = None,
    loss: PreferenceLoss | None = None,
) -> DataLoader[Any]:
    """A loader whose items are one optimizer step's micro-batches for this rank.

    Args:
        groups: What is trained on.
        batcher: Of its steps.
        args: Mode, sharing and workers.
        reads: As in `StepDataset`; for a loss's, see `kvpref.engine.passes.reads_of`.
        loss: As in `StepDataset`; left out of data workers that it cannot reach, and then makes its tensors itself.
    """
    if loss is not None and args.dataloader_num_workers > 0 and not _reaches_workers(loss):
        loss = None
    return DataLoader(
        StepDataset(groups, args, ahead=collates_ahead(args), reads=reads, loss=loss),
        batch_sampler=StepSampler(batcher, rank=args.process_index),  # type: ignore[arg-type]
        collate_fn=_keep,  # type: ignore[arg-type]
        # In a data worker there is no device; without workers the thread that collates pins.
        pin_memory=args.dataloader_num_workers > 0 and pins_memory(args),
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def _reaches_workers(loss: PreferenceLoss) -> bool:
    """Whether data workers know the loss, and what they make for it can be sent back.

    Other processes than forks of this one may not find the module of a user's loss; what is defined inside a function
    cannot be sent.
    """
    if multiprocessing.get_start_method() != "fork":
        return False
    try:
        pickle.dumps(loss)
    except Exception:  # whatever a user's loss raises
        return False
    return True


def _keep(step: StepInputs) -> StepInputs:
    return step
