"""The loader of batched steps."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from typing import Any

from torch.utils.data import DataLoader

from kvpref.data import PreferenceDataset, StepBatcher, StepSampler
from kvpref.losses import PreferenceLoss
from kvpref.plan.passes import Reads
from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.loading.collation import StepDataset, collates_ahead, pins_memory


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
        groups: The training data.
        batcher: Plans its steps.
        args: Settings of mode, sharing and workers.
        reads: As in `StepDataset`; for a loss's, see `kvpref.engine.passes.reads_of`.
        loss: As in `StepDataset`; if it cannot be sent to data workers, it builds its tensors in this process.
    """
    if loss is not None and args.dataloader_num_workers > 0 and not _reaches_workers(loss):
        loss = None
    return DataLoader(
        StepDataset(groups, args, ahead=collates_ahead(args), reads=reads, loss=loss),
        batch_sampler=StepSampler(batcher, rank=args.data_rank),  # type: ignore[arg-type]
        collate_fn=_keep,  # type: ignore[arg-type]
        # Data workers have no device; without workers the collating thread pins.
        pin_memory=args.dataloader_num_workers > 0 and pins_memory(args),
        num_workers=args.dataloader_num_workers,
        worker_init_fn=_leave_interrupts_to_the_trainer if args.dataloader_num_workers else None,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def _reaches_workers(loss: PreferenceLoss) -> bool:
    """Whether the loss can be sent to data workers, and what they make for it can be sent back.

    Processes that are not forks of this one may not find the module of a user's loss, and objects defined inside a
    function cannot be sent.
    """
    if multiprocessing.get_start_method() != "fork":
        return False
    try:
        pickle.dumps(loss)
    except Exception:  # a user's loss may raise anything
        return False
    return True


def _keep(step: Any) -> Any:
    return step


def _leave_interrupts_to_the_trainer(worker: int) -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal; the training process saves and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
