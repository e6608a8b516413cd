"""The four ways to train, and one training of each, step by step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from peers.task import Task
from peers.trainer_steps import trainer_steps
from transformers import PrinterCallback

import kvpref
from kvpref.integrations.shared_prefix.switch import SharedPrefix
from kvpref.models.support import unwrap
from trl_users.interface import Workload


class Training:
    """A training run that advances one step at a time.

    Args:
        trainer: With one micro-batch per optimizer step.
        switch: Around its model, if there is one; closed at the end.

    Attributes:
        losses: Of each step.
        gradient_norms: Of each step, before clipping.
        layer_tokens: Tokens that ran through the layers in each step, padding included.
    """

    def __init__(self, trainer: Any, switch: SharedPrefix | None = None) -> None:
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []
        self.layer_tokens: list[int] = []
        self.switch = switch
        trainer.remove_callback(PrinterCallback)  # stdout is the table's
        self._steps = trainer_steps(trainer, [])
        _record_norms(trainer.accelerator, self.gradient_norms)
        first_layer = unwrap(trainer.model).base_model.layers[0]
        first_layer.register_forward_pre_hook(self._count, with_kwargs=True)

    def step(self) -> None:
        """All that the trainer does for one optimizer step: data, forward, backward, clipping, AdamW."""
        self.layer_tokens.append(0)
        self.losses.append(next(self._steps))

    def finish(self) -> None:
        """Let the trainer end, once all of its steps are done."""
        for _ in self._steps:
            raise AssertionError("the trainer had a step left")
        if self.switch is not None:
            self.switch.close()

    def _count(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        # Reference log-probs are computed without gradients.
        if torch.is_grad_enabled():
            self.layer_tokens[-1] += hidden.shape[0] * hidden.shape[1]


def _record_norms(accelerator: Any, norms: list[float]) -> None:
    """Keep the norms that the trainer computes to clip gradients."""
    clip = accelerator.clip_grad_norm_

    def clip_and_record(*args: Any, **kwargs: Any) -> Any:
        norm = clip(*args, **kwargs)
        norms.append(float(norm))
        return norm

    accelerator.clip_grad_norm_ = clip_and_record


def _trl(workload: Workload, task: Task) -> Training:
    return Training(workload.trl_trainer(importlib.import_module("trl"), task))


def _trl_in_shared_prefix(workload: Workload, task: Task) -> Training:
    trainer = workload.trl_trainer(importlib.import_module("trl"), task)
    return Training(trainer, kvpref.shared_prefix(trainer.model))


def _subclass(workload: Workload, task: Task) -> Training:
    return Training(workload.trl_trainer(importlib.import_module("kvpref.integrations.trl"), task))


def _kvpref(workload: Workload, task: Task) -> Training:
    return Training(workload.kvpref_trainer(task))


BASELINE = "trl"

WAYS: dict[str, Callable[[Workload, Task], Training]] = {
    BASELINE: _trl,
    "shared_prefix": _trl_in_shared_prefix,
    "integrations.trl": _subclass,
    "kvpref": _kvpref,
}
"""TRL's trainer, the same inside `kvpref.shared_prefix`, the subclass in `kvpref.integrations.trl`, and
`kvpref.PreferenceTrainer`."""
