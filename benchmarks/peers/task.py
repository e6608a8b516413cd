"""The task that kvpref and a peer are given: the same model, token ids, batches and optimizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from kvpref.data import PreferenceDataset, load_preferences
from kvpref.data.reading.tokenization import load_tokenizer
from kvpref.records.groups import Group

Batching = Literal["random", "group_by_length"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Pairs in batches, and how to train on them."""

    rows: tuple[dict[str, str], ...]
    """The pairs as text: prompt, chosen, rejected."""

    groups: PreferenceDataset
    """The same pairs as tokens, chosen first."""

    tokenizer: PreTrainedTokenizerBase
    """Makes the tokens."""

    model_settings: dict[str, Any]
    """For `AutoConfig.for_model`."""

    work_dir: Path
    """Where trainers may write."""

    batches: tuple[tuple[int, ...], ...] = ()
    """Indices of the pairs of each optimizer step."""

    device: str = "cpu"
    """Where everything runs."""

    learning_rate: float = 1e-4
    """Of AdamW, constant, without weight decay."""

    beta: float = 0.1
    """Of DPO."""

    seed: int = 0
    """Of the weights and of the order."""

    def make_model(self) -> PreTrainedModel:
        """The model from its initial weights, float32, with `sdpa` attention; the same at every call."""
        torch.manual_seed(self.seed)
        config = AutoConfig.for_model(**self.model_settings)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        return model.to(self.device)

    def step_groups(self, step: int) -> list[Group]:
        """The pairs of one optimizer step."""
        return [self.groups[index] for index in self.batches[step]]

    def in_batches(self, batching: Batching, *, num_steps: int, pairs_per_step: int) -> Task:
        """This task with the batches of `num_steps` optimizer steps, spread evenly over one epoch.

        Args:
            batching: ``random`` order, or ``group_by_length`` as transformers sorts, from the seed.
            num_steps: Optimizer steps.
            pairs_per_step: Pairs in each.

        Raises:
            ValueError: If there are too few pairs.
        """
        order = _ORDERS[batching](self, pairs_per_step)
        complete = [
            tuple(order[start : start + pairs_per_step])
            for start in range(0, len(order) - pairs_per_step + 1, pairs_per_step)
        ]
        if len(complete) < num_steps:
            raise ValueError(
                f"{num_steps} steps of {pairs_per_step} pairs need {num_steps * pairs_per_step} pairs; "
                f"the data has {len(order)}"
            )
        chosen = [complete[(2 * step + 1) * len(complete) // (2 * num_steps)] for step in range(num_steps)]
        return replace(self, batches=tuple(chosen))


def _random_order(task: Task, pairs_per_step: int) -> list[int]:
    order = list(range(len(task.groups)))
    random.Random(task.seed).shuffle(order)
    return order


def _length_grouped_order(task: Task, pairs_per_step: int) -> list[int]:
    lengths = [length.max_sequence_tokens for length in task.groups.lengths]
    generator = torch.Generator().manual_seed(task.seed)
    return [int(index) for index in get_length_grouped_indices(lengths, pairs_per_step, generator=generator)]


_ORDERS: dict[Batching, Callable[[Task, int], list[int]]] = {
    "random": _random_order,
    "group_by_length": _length_grouped_order,
}


def load_task(data: Path, tokenizer: Path, model: Path, *, work_dir: Path, device: str = "cpu") -> Task:
    """The pairs of a JSONL file with text fields prompt, chosen and rejected.

    Raises:
        InputError: If the data or the tokenizer cannot be read.
    """
    loaded = load_tokenizer(str(tokenizer))
    return make_task(data, loaded, json.loads(model.read_text()), work_dir=work_dir, device=device)


def make_task(
    data: Path,
    tokenizer: PreTrainedTokenizerBase,
    model_settings: dict[str, Any],
    *,
    work_dir: Path,
    device: str = "cpu",
) -> Task:
    """As `load_task`, with tokenizer and model settings at hand."""
    fields = ("prompt", "chosen", "rejected")
    rows = tuple(json.loads(line) for line in data.read_text().splitlines() if line.strip())
    return Task(
        rows=tuple({name: row[name] for name in fields} for row in rows),
        groups=load_preferences(str(data), tokenizer),
        tokenizer=tokenizer,
        model_settings=model_settings,
        work_dir=work_dir,
        device=device,
    )
