"""Reward models: TRL's on pairs cut from groups, kvpref's on the groups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from peers.task import Task
from transformers import AutoConfig, AutoModelForSequenceClassification

from kvpref import Group
from trl_users.interface import Source, Workload, all_groups, trl_settings
from trl_users.scored_groups import RESPONSES, load_scored_groups, made_up_scored_groups, num_right


class RewardPairs(Workload):
    """`RewardTrainer`. A group with one right response, or one wrong, gives three pairs, so that the mean over pairs is
    the mean over groups; pairs repeat the prompt and one response, which `kvpref.PreferenceTrainer` need not."""

    name = "reward"
    title = "reward model"
    data = "gsm8k_groups"
    groups_per_step = 2
    loss = "bradley_terry"
    loss_args: ClassVar[Mapping[str, Any]] = {}

    def load(self, source: Source, work_dir: Path) -> Task:
        """As in `Workload`."""
        return load_scored_groups(source, work_dir, lambda group: num_right(group) in (1, RESPONSES - 1))

    def made_up(self, work_dir: Path) -> Task:
        """As in `Workload`."""
        return made_up_scored_groups(work_dir)

    def make_model(self, task: Task) -> Any:
        """As in `Workload`, with a head of one output."""
        torch.manual_seed(task.seed)
        config = AutoConfig.for_model(**task.model_settings, num_labels=1, pad_token_id=task.tokenizer.pad_token_id)
        return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").to(task.device)

    def trl_trainer(self, trainers: ModuleType, task: Task) -> Any:
        """As in `Workload`."""
        from datasets import Dataset
        from trl import RewardConfig

        args = RewardConfig(
            output_dir=str(task.work_dir / "trl_reward"),
            max_length=None,
            train_sampling_strategy="sequential",
            **trl_settings(task, rows_per_group=RESPONSES - 1),
        )
        return trainers.RewardTrainer(
            model=self.make_model(task),
            args=args,
            train_dataset=Dataset.from_list([pair for group in all_groups(task) for pair in _pairs(group)]),
            processing_class=task.tokenizer,
        )


def _pairs(group: Group) -> list[dict[str, list[int]]]:
    """Every response with every worse one, as tokens."""
    assert group.scores is not None
    scored = list(zip(group.sequences, group.scores, strict=True))
    return [
        {"chosen_ids": list(chosen.input_ids), "rejected_ids": list(rejected.input_ids)}
        for chosen, high in scored
        for rejected, low in scored
        if high > low
    ]
