"""kvpref's side of each comparison: its trainer against trainers, its engine in a plain loop against loops."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

import kvpref
from kvpref.engine.reads import reads_of
from kvpref.losses import make_loss
from kvpref.models.shape import model_shape
from kvpref.plan.flops import count_work
from kvpref.records.groups import Group
from kvpref.records.outputs import ResponseLogps
from kvpref.training.loading.batcher import make_batcher
from kvpref.training.loading.loader import make_loader
from peers.interface import FirstBatch, Runner, StepWork, flat_gradient
from peers.loop import TrainingLoop
from peers.task import Task
from peers.trainer_steps import trainer_steps


def trainer_settings(task: Task) -> dict[str, Any]:
    """Settings that both trainers share, as arguments of `transformers.TrainingArguments`."""
    return {
        "per_device_train_batch_size": len(task.batches[0]),
        "max_steps": len(task.batches),
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "seed": task.seed,
        "bf16": False,
        "use_cpu": task.device == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class FixedOrderTrainer(kvpref.PreferenceTrainer):
    """`PreferenceTrainer` on steps in the dataset's order."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        assert self.train_dataset is not None
        batcher = make_batcher(
            self.train_dataset, self.args, groups_per_device=self.args.per_device_train_batch_size, shuffle=False
        )
        return make_loader(
            self.train_dataset, batcher, self.args, reads=reads_of(self.model, self.loss.reads), loss=self.loss
        )


class KvprefTrainer(Runner):
    """`kvpref.PreferenceTrainer` with its default settings, mode ``two_pass``."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.optimizer_seconds: list[float] = []
        # A folder of its own: reference log-probs that an earlier runner stored would be found, and not timed.
        args = kvpref.PreferenceTrainingArguments(
            output_dir=tempfile.mkdtemp(prefix="kvpref-", dir=task.work_dir),
            loss="dpo",
            loss_args={"beta": task.beta},
            sort_window_steps=1,  # keeps every pair in the step that the task put it in
            **trainer_settings(task),
        )
        groups = [group for step in range(len(task.batches)) for group in task.step_groups(step)]
        self.trainer = FixedOrderTrainer(model=task.make_model(), args=args, train_dataset=groups)

    def first_batch(self) -> FirstBatch:
        """As in `Runner`."""
        return _first_batch(self.trainer.model, self.task)

    def steps(self) -> Iterator[float]:
        """As in `Runner`; reference log-probs are computed here, before the first step."""
        started = time.perf_counter()
        self.trainer.references.prepare("train", self.trainer.train_dataset)
        self.precompute_seconds = time.perf_counter() - started
        return trainer_steps(self.trainer, self.optimizer_seconds)

    def work(self) -> list[StepWork]:
        """As in `Runner`."""
        return _two_pass_work(self.trainer.model, self.task)


class KvprefLoop(TrainingLoop):
    """`kvpref.response_logps` in a plain loop, mode ``two_pass``."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        kvpref.attach(self.model)

    def sequence_logps(self, groups: Sequence[Group]) -> torch.Tensor:
        """As in `TrainingLoop`."""
        return kvpref.response_logps(self.model, kvpref.collate(groups, device=self.task.device)).sum()

    def work(self) -> list[StepWork]:
        """As in `Runner`."""
        return _two_pass_work(self.model, self.task)


def _first_batch(model: Any, task: Task) -> FirstBatch:
    """Through the functions that the trainer's step runs."""
    batch = kvpref.collate(task.step_groups(0), device=task.device)
    model.train()
    with torch.no_grad():
        logps = kvpref.response_logps(model, batch)
    reference = ResponseLogps(torch.zeros_like(logps.token_logps), logps.cu_seqlens, logps.group_index)
    loss_fn = make_loss("dpo", beta=task.beta)
    output = kvpref.forward_backward(model, batch, loss_fn, reference=reference)
    return FirstBatch(logps=logps.sum().float().cpu(), loss=output.loss.item(), gradient=flat_gradient(model))


def _two_pass_work(model: Any, task: Task) -> list[StepWork]:
    shape = model_shape(model)
    counts = [count_work(kvpref.collate(task.step_groups(step)).plan("two_pass")) for step in range(len(task.batches))]
    return [
        StepWork(num_tokens=count.num_tokens, num_head_rows=count.num_scored, flops=shape.flops(count))
        for count in counts
    ]
