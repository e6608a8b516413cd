"""What trainer tests compare references with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from preference_runs import make_args, make_groups, make_model
from torch import nn

import kvpref


def make_trainer(output: Path, model: nn.Module | None = None, **settings: Any) -> kvpref.PreferenceTrainer:
    """A trainer of dpo over `make_groups()`; `loss`, `reference_model` and `callbacks` may be objects."""
    own = {name: settings.pop(name) for name in ("reference_model", "loss", "callbacks") if name in settings}
    if isinstance(own.get("loss"), str) or isinstance(own.get("reference_model"), str):
        settings.update({name: own.pop(name) for name in list(own) if isinstance(own[name], str)})
    return kvpref.PreferenceTrainer(
        model or make_model(), make_args(str(output), **settings), train_dataset=make_groups(), **own
    )


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
