"""Stopping training after the current step on request, with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


class StopCallback(TrainerCallback):
    """Stops after the step in which `is_asked` becomes true on any rank; all ranks stop and save together.

    Attributes:
        has_begun: Whether the training loop was reached.
        is_running: Whether the training loop is running, so that a step's end will come.
        stopped_at: The step after which training was stopped, or None.
        saves: Whether that step's checkpoint is saved.
    """

    def __init__(self, is_asked: Callable[[], bool]) -> None:
        self._is_asked = is_asked
        self.has_begun = self.is_running = False
        self.stopped_at: int | None = None
        self.saves = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.has_begun = self.is_running = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not _on_any_rank(self._is_asked(), args):
            return
        self.stopped_at, self.saves = state.global_step, args.save_strategy != SaveStrategy.NO
        control.should_log = True  # the mean since the last log line would be lost
        control.should_save = self.saves
        control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped_at is not None:  # the epoch has not ended, and the step is saved already
            control.should_evaluate = control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_running = False


def _on_any_rank(asked: bool, args: TrainingArguments) -> bool:
    if args.world_size == 1:
        return asked
    flag = torch.tensor(float(asked), device=args.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
