"""DPO on pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from peers.made_up import made_up_task
from peers.task import Task, load_task
from peers.trl_dpo import check_tokens

from trl_users.interface import Source, Workload, trl_settings


class PairPreferences(Workload):
    """`DPOTrainer`. All trainers compute the reference log-probs before their first step."""

    name = "dpo"
    title = "DPO"
    data = "hh_harmless_pairs"
    groups_per_step = 6
    loss = "dpo"
    loss_args: ClassVar[Mapping[str, Any]] = {"beta": 0.1}

    def load(self, source: Source, work_dir: Path) -> Task:
        """As in `Workload`."""
        return load_task(source.data, source.tokenizer, source.model, work_dir=work_dir)

    def made_up(self, work_dir: Path) -> Task:
        """As in `Workload`."""
        return made_up_task(work_dir)

    def trl_trainer(self, trainers: ModuleType, task: Task) -> Any:
        """As in `Workload`."""
        from datasets import Dataset
        from trl import DPOConfig

        rows = [task.rows[index] for batch in task.batches for index in batch]
        # TRL stores reference log-probs under the data's fingerprint: with a column of its own, each trainer uses those
        # that it computed itself.
        dataset = Dataset.from_list(rows).add_column("trainers", [trainers.__name__] * len(rows))
        args = DPOConfig(
            output_dir=str(task.work_dir / "trl_dpo"),
            max_length=None,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
            **self.loss_args,
            **trl_settings(task),
        )
        trainer = trainers.DPOTrainer(
            model=self.make_model(task), args=args, train_dataset=dataset, processing_class=task.tokenizer
        )
        check_tokens(trainer.train_dataset, task)
        return trainer
