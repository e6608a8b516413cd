"""What trainer tests compare references with."""

from __future__ import annotations

import torch
from preference_runs import make_groups
from torch import nn

import kvpref


def token_logps(model: nn.Module, **options: object) -> torch.Tensor:
    """(S,) log-probs of `make_groups()` under a model, group after group."""
    with torch.no_grad():
        return kvpref.response_logps(kvpref.attach(model.eval()), kvpref.collate(make_groups()), **options).token_logps


def reference_logps(trainer: kvpref.PreferenceTrainer) -> torch.Tensor:
    """(S,) what the trainer's loss gets as the reference of its training groups now, group after group."""
    trainer.references.prepare("train", trainer.train_dataset)
    by_group: dict[int, torch.Tensor] = {}
    for step in trainer._make_loader(trainer.train_dataset, 100, shuffle=False):
        for item in step:
            found = trainer.references.for_batch("train", item, item.batch)
            sizes = [sum(sum(sequence.scored) for sequence in group.sequences) for group in item.batch.groups]
            by_group.update(zip(item.group_indices, found.token_logps.split(sizes), strict=True))
    return torch.cat([by_group[index] for index in sorted(by_group)])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()
