"""What a workload offers: its data, and each side's trainer on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from peers.ours import FixedOrderTrainer, trainer_settings
from peers.task import Task

import kvpref

LEARNING_RATE = 1e-5
"""Of AdamW: losses move from step to step, and rounding, which Adam scales up, stays far below the tolerance."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a real run's data lies."""

    data: Path
    """JSONL."""

    tokenizer: Path
    """Folder."""

    model: Path
    """JSON for `AutoConfig.for_model`; the weights are random."""


class Workload(ABC):
    """One of TRL's trainers on one file, and what of kvpref does the same.

    Attributes:
        name: On the command line and in the JSON.
        title: Heads a column of the table.
        data: Name of the file, without its ending.
        groups_per_step: Prompts in an optimizer step.
        loss: Name of kvpref's loss that is the trainer's.
        loss_args: Its settings.
    """

    name: str
    title: str
    data: str
    groups_per_step: int
    loss: str
    loss_args: ClassVar[Mapping[str, Any]]

    @abstractmethod
    def load(self, source: Source, work_dir: Path) -> Task:
        """All of the data.

        Raises:
            InputError: If the data or the tokenizer cannot be read.
        """

    @abstractmethod
    def made_up(self, work_dir: Path) -> Task:
        """Tiny data and a tiny model, for runs that measure nothing."""

    @abstractmethod
    def trl_trainer(self, trainers: ModuleType, task: Task) -> Any:
        """The trainer that `trainers` has, ``trl`` or ``kvpref.integrations.trl``, on a fresh model."""

    def make_model(self, task: Task) -> Any:
        """The model from its initial weights, float32; the same at every call."""
        return task.make_model()

    def take_steps(self, task: Task, num_steps: int) -> Task:
        """Batches of `num_steps` optimizer steps, spread over the data. Each is of sequences of similar length, so that
        padding costs TRL little.

        Raises:
            ValueError: If there is too little data.
        """
        task = replace(task, learning_rate=LEARNING_RATE)
        return task.in_batches("group_by_length", num_steps=num_steps, pairs_per_step=self.groups_per_step)

    def kvpref_trainer(self, task: Task) -> kvpref.PreferenceTrainer:
        """`PreferenceTrainer` with its default settings, mode ``two_pass``, on a fresh model."""
        args = kvpref.PreferenceTrainingArguments(
            output_dir=str(task.work_dir / f"kvpref_{self.name}"),
            loss=self.loss,
            loss_args=dict(self.loss_args),
            sort_window_steps=1,  # keeps every group in the step that the task put it in
            **trainer_settings(task),
        )
        return FixedOrderTrainer(model=self.make_model(task), args=args, train_dataset=all_groups(task))


def all_groups(task: Task) -> list[kvpref.Group]:
    """The groups of all steps, in order."""
    return [group for step in range(len(task.batches)) for group in task.step_groups(step)]


def trl_settings(task: Task, *, rows_per_group: int = 1) -> dict[str, Any]:
    """Settings of TRL's trainers: the same as kvpref's, and otherwise the fastest for them here.

    Args:
        task: With batches.
        rows_per_group: Rows of a batch, as TRL counts them, per prompt.
    """
    same = trainer_settings(task)
    num_rows = rows_per_group * same["per_device_train_batch_size"]
    return {**same, "per_device_train_batch_size": num_rows, "gradient_checkpointing": False}
