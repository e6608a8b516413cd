"""A whole training step of some losses, and how often it makes the host wait for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from options import SweepOptions
from places import ROOT

import kvpref
from gpu_run.rows import Figure, Finding, Rows, judged, measured
from gpu_run.wide_models import make_groups, make_model
from kvpref import Group
from kvpref.losses import make_loss
from kvpref.profiling.steps import TrainStep, make_micro_batches
from kvpref.profiling.timing import time_once

LOSSES = ("dpo", "kto", "grpo", "bradley_terry")
_WORDS = "called a synchronizing CUDA operation"


def rows(options: SweepOptions) -> Rows:
    """One per loss."""
    return {name: partial(_row, name, options) for name in LOSSES}


def _row(name: str, options: SweepOptions) -> Finding:
    step = _make_step(name, options)
    step()  # kernels load, Triton compiles, the optimizer makes its state
    milliseconds = time_once(step, options.device, options.clock)
    figures = {"step": Figure(milliseconds, "ms")}
    if options.device.type != "cuda":
        return measured(figures, reason="synchronisations are counted on CUDA devices only")
    with counted_synchronisations() as places:
        step()
    figures["synchronisations"] = Figure(places.total(), "")
    told = ", ".join(f"{place} ({count})" for place, count in places.most_common(4))
    return judged(met=not places, bar="no synchronisation", figures=figures, reason=told or None)


def _make_step(name: str, options: SweepOptions) -> Callable[[], None]:
    """Forward, backward, clipping, AdamW, on micro-batches that are on the device already."""
    loss = make_loss(name)
    model = kvpref.attach(make_model("llama", options, rewards=loss.reads == "ends"))
    groups = list(loss.prepare([_rated(group, name) for group in make_groups(options)]))
    cut = [groups[:2], groups[2:]]
    micro_batches = make_micro_batches(model, cut, loss, mode="two_pass", device=options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    step = TrainStep(model, loss, micro_batches, "two_pass")

    def run() -> None:
        step.run()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def _rated(group: Group, loss: str) -> Group:
    """Pairs where the loss wants pairs; the first response is the best."""
    sequences = group.sequences[:2] if loss == "dpo" else group.sequences
    labels = [index == 0 for index in range(len(sequences))]
    return Group(sequences, labels=labels, scores=[1.0 - index for index in range(len(sequences))])


@contextmanager
def counted_synchronisations() -> Iterator[Counter[str]]:
    """Counts, by place, what waits for the device inside the block; filled at its end."""
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places.update(f"{_shown(item.filename)}:{item.lineno}" for item in caught if _WORDS in str(item.message))


def _shown(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "/".join(path.parts[-3:])
