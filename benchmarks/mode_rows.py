"""Rows that run a whole model in the modes that share prefixes, against mode `packed`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from llama_models import build_model
from options import SweepOptions
from transformers import PreTrainedModel
from workloads import Workload

from kvpref.errors import RunError
from kvpref.losses import LossFunction, PreferenceLoss
from kvpref.profiling.compare.comparison import Comparison
from kvpref.profiling.compare.modes import Cut, compare_modes
from kvpref.profiling.steps import BASELINE_MODE


def measure_modes(
    name: str,
    build: Callable[[], Workload],
    options: SweepOptions,
    *,
    loss: Callable[[Workload], PreferenceLoss | LossFunction],
    with_optimizer: bool,
) -> Comparison:
    """Build a workload and its model, and compare the modes on it.

    Raises:
        RunError: If the modes do not compute the same; nothing is timed then.
    """
    workload = build()
    model = build_model(workload.sizes, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if with_optimizer else None
    return compare_model(
        name,
        model,
        workload.cuts,
        options,
        loss=loss(workload),
        optimizer=optimizer,
        facts=asdict(workload.sizes),
        bar=workload.bar,
    )


def compare_model(
    name: str,
    model: PreTrainedModel,
    cuts: Mapping[str, Cut],
    options: SweepOptions,
    *,
    loss: PreferenceLoss | LossFunction,
    facts: Mapping[str, Any],
    bar: float | None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Comparison:
    """Compare the modes on a model.

    Raises:
        RunError: If the modes do not compute the same; nothing is timed then.
    """
    comparison = compare_modes(
        model,
        cuts,
        loss,
        optimizer=optimizer,
        backend=options.backend,
        options=options.timing,
        with_memory=options.with_memory,
    )
    if comparison.different:
        raise RunError("; ".join(f"{mode}: {how}" for mode, how in comparison.different.items()))
    return Comparison(
        name=name,
        baseline=BASELINE_MODE,
        results=comparison.results,
        facts={
            **facts,
            "num_groups": sum(len(groups) for groups in cuts["two_pass"]),
            **{f"loss {mode}": outcome.loss for mode, outcome in comparison.outcomes.items()},
        },
        bar=bar,
    )
