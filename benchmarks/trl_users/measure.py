"""The four ways on one workload, taking turns: their losses must agree."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from peers.task import Task

from kvpref.errors import RunError
from kvpref.profiling.compare.spread import Spread
from kvpref.profiling.timing import TimingOptions, time_rounds
from trl_users.interface import Workload
from trl_users.ways import BASELINE, WAYS, Training

TOLERANCE = 1e-4
"""Relative, for losses and gradient norms: float32, summed in another order, and carried through some updates."""


def measure(workload: Workload, task: Task, timing: TimingOptions) -> dict[str, Any]:
    """Train in all ways on the task's batches, step by step in turns.

    Args:
        workload: What to train.
        task: With as many batches as `timing` has rounds, warm-up included.
        timing: Rounds; a round is an optimizer step of each.

    Returns:
        For JSON: per way its times in milliseconds, their ratio to TRL's in the same round, losses, gradient norms and
        tokens.

    Raises:
        RunError: If losses or gradient norms differ by more than `TOLERANCE`.
    """
    trainings = {name: make(workload, task) for name, make in WAYS.items()}
    steps = {name: training.step for name, training in trainings.items()}
    rounds_ms = time_rounds(steps, torch.device(task.device), timing)
    for training in trainings.values():
        training.finish()
    differences = {name: _differences(training, trainings[BASELINE]) for name, training in trainings.items()}
    _check(workload, differences)
    ways = {
        name: _facts(training, rounds_ms[name], rounds_ms[BASELINE], timing.num_warmup)
        | {"largest_relative_difference": differences[name]}
        for name, training in trainings.items()
    }
    return {
        "name": workload.name,
        "title": workload.title,
        "data": workload.data,
        "groups_per_step": workload.groups_per_step,
        "loss": {"name": workload.loss, **workload.loss_args},
        "ways": ways,
    }


def _facts(
    training: Training, own_ms: tuple[float, ...], baseline_ms: tuple[float, ...], num_warmup: int
) -> dict[str, Any]:
    ratios = [baseline / own for baseline, own in zip(baseline_ms, own_ms, strict=True)]
    return {
        "time_ms": asdict(Spread.of(own_ms)),
        "speedup": asdict(Spread.of(ratios)),
        "layer_tokens_per_step": median(training.layer_tokens[num_warmup:]),
        "rounds_ms": own_ms,
        "layer_tokens": training.layer_tokens,
        "losses": training.losses,
        "gradient_norms": training.gradient_norms,
        "switch": None if training.switch is None else str(training.switch.stats),
    }


def _differences(found: Training, truth: Training) -> dict[str, float]:
    """The largest over all steps."""
    return {
        "loss": _largest(found.losses, truth.losses),
        "gradient_norm": _largest(found.gradient_norms, truth.gradient_norms),
    }


def _largest(found: list[float], truth: list[float]) -> float:
    return max(abs(own - true) / abs(true) for own, true in zip(found, truth, strict=True))


def _check(workload: Workload, differences: dict[str, dict[str, float]]) -> None:
    for way, quantities in differences.items():
        for quantity, difference in quantities.items():
            if not difference <= TOLERANCE:
                raise RunError(
                    f"{workload.name}, {way}: {quantity} differs from TRL's by {difference:.1e} relative, above "
                    f"{TOLERANCE:.0e}; its time says nothing"
                )
