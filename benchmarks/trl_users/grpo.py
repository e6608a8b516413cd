"""GRPO's update on samples that are given, with their rewards and the log-probs they were drawn with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from peers.task import Task
from torch.nn.utils.rnn import pad_sequence

import kvpref
from kvpref import Group
from kvpref.data import PreferenceDataset
from kvpref.losses.scores import has_preference
from trl_users.interface import Source, Workload, all_groups, trl_settings
from trl_users.scored_groups import RESPONSES, load_scored_groups, made_up_scored_groups

STALENESS_NATS = 0.3
"""Standard deviation by which the old log-prob of a token differs from the initial weights'. Ratios of 1 would make the
loss 0, whatever was computed; these reach both clips."""

_OLD = "old"


class GivenSamples(Workload):
    """`GRPOTrainer`, with its generation replaced by the file's responses; what follows is its own code."""

    name = "grpo"
    title = "GRPO update"
    data = "gsm8k_groups"
    groups_per_step = 2
    loss = "grpo"
    loss_args: ClassVar[Mapping[str, Any]] = {"old": _OLD, "epsilon": 0.2}

    def load(self, source: Source, work_dir: Path) -> Task:
        """As in `Workload`; groups whose scores are all equal teach nothing and are left out."""
        return load_scored_groups(source, work_dir, has_preference)

    def made_up(self, work_dir: Path) -> Task:
        """As in `Workload`."""
        return made_up_scored_groups(work_dir)

    def take_steps(self, task: Task, num_steps: int) -> Task:
        """As in `Workload`; the samples get their old log-probs."""
        task = super().take_steps(task, num_steps)
        model = kvpref.attach(task.make_model())
        generator = torch.Generator().manual_seed(task.seed)
        groups = [_with_old_logps(group, model, generator) for group in all_groups(task)]
        size = self.groups_per_step
        batches = tuple(tuple(range(start, start + size)) for start in range(0, len(groups), size))
        return replace(task, groups=PreferenceDataset(groups), batches=batches)

    def trl_trainer(self, trainers: ModuleType, task: Task) -> Any:
        """As in `Workload`."""
        from datasets import Dataset
        from trl import GRPOConfig

        class OnGivenSamples(trainers.GRPOTrainer):  # type: ignore[misc, name-defined]
            def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
                # TRL names a prompt once for each of its responses.
                indices = dict.fromkeys(row["group"] for row in inputs)
                return _samples([task.groups[index] for index in indices], task.tokenizer.pad_token_id)

        args = GRPOConfig(
            output_dir=str(task.work_dir / "trl_grpo"),
            num_generations=RESPONSES,
            beta=0.0,
            loss_type="grpo",
            epsilon=self.loss_args["epsilon"],
            temperature=1.0,
            shuffle_dataset=False,
            **trl_settings(task, rows_per_group=RESPONSES),
        )
        return OnGivenSamples(
            model=self.make_model(task),
            args=args,
            reward_funcs=_no_reward,
            train_dataset=Dataset.from_list([{"prompt": "", "group": index} for index in range(len(task.groups))]),
            processing_class=task.tokenizer,
        )


def _no_reward(completions: list[Any], **columns: Any) -> list[float]:
    raise AssertionError("the samples come with their rewards")


def _with_old_logps(group: Group, model: Any, generator: torch.Generator) -> Group:
    """The group with a column of one number per scored token."""
    with torch.no_grad():
        logps = kvpref.response_logps(model, kvpref.collate([group]), mode="padded")
    old = logps.token_logps + STALENESS_NATS * torch.randn(logps.token_logps.shape, generator=generator)
    by_response = [part.tolist() for part in old.split(logps.lengths().tolist())]
    return Group(group.sequences, scores=group.scores, id=group.id, columns={_OLD: by_response})


def _samples(groups: list[Group], pad_token_id: int) -> dict[str, torch.Tensor]:
    """What `GRPOTrainer._generate_and_score_completions` returns: prompts padded left and completions right."""
    sequences = [sequence for group in groups for sequence in group.sequences]
    starts = [sequence.scored.index(True) for sequence in sequences]
    prompts = [torch.tensor(s.input_ids[:start]) for s, start in zip(sequences, starts, strict=True)]
    completions = [torch.tensor(s.input_ids[start:]) for s, start in zip(sequences, starts, strict=True)]
    old = [torch.tensor(values) for group in groups for values in group.columns[_OLD]]
    rewards = torch.tensor([group.scores for group in groups])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return {
        "prompt_ids": pad_sequence(prompts, True, pad_token_id, "left"),
        "prompt_mask": pad_sequence([torch.ones_like(row) for row in prompts], True, 0, "left"),
        "completion_ids": pad_sequence(completions, True, pad_token_id),
        "completion_mask": pad_sequence([torch.ones_like(row) for row in completions], True),
        "advantages": advantages.flatten(),
        "old_per_token_logps": pad_sequence(old, True),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
