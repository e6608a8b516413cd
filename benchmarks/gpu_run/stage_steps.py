"""Whole training steps with several losses, and how often each makes the host wait for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
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
from kvpref.engine.reads import reads_of
from kvpref.losses import make_loss
from kvpref.profiling.steps import StepMicroBatch, TrainStep
from kvpref.profiling.timing import time_once

LOSSES = ("dpo", "kto", "grpo", "bradley_terry")
_WORDS = "called a synchronizing CUDA operation"


def rows(options: SweepOptions) -> Rows:
    """One row per loss."""
    return {name: partial(_row, name, options) for name in LOSSES}


def _row(name: str, options: SweepOptions) -> Finding:
    training = Training(name, options)
    for _ in range(2):  # kernels load, Triton compiles, the optimizer makes its state
        training.step(training.next_inputs())
    inputs = training.next_inputs()
    milliseconds = time_once(partial(training.step, inputs), options.device, options.clock)
    figures = {"step": Figure(milliseconds, "ms")}
    if options.device.type != "cuda":
        return measured(figures, reason="synchronisations are counted on CUDA devices only")
    # Of their own: what a loss makes of a batch it may keep for the next time.
    inputs = training.next_inputs()
    with counted_synchronisations() as places:
        training.step(inputs)
    figures["synchronisations"] = Figure(places.total(), "")
    told = ", ".join(f"{place} ({count})" for place, count in places.most_common(4))
    return judged(met=not places, bar="no synchronisation", figures=figures, reason=told or None)


class Training:
    """Steps as a trainer runs them: micro-batches made on the host, forward, backward, clipping, AdamW.

    Args:
        name: Of the loss.
        options: Device and size.
    """

    def __init__(self, name: str, options: SweepOptions) -> None:
        self.loss, self.device = make_loss(name), options.device
        self.model = kvpref.attach(make_model("llama", options, rewards=self.loss.reads == "ends"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        groups = list(self.loss.prepare([_rated(group, name) for group in make_groups(options)]))
        self.cut = [groups[:2], groups[2:]]

    def next_inputs(self) -> TrainStep:
        """Two micro-batches on the device, with reference log-probs where the loss reads some."""
        reads = reads_of(self.model, self.loss.reads)
        batches = [kvpref.collate(groups, reads=reads) for groups in self.cut]
        for batch in batches:
            self.loss.prepare_batch(batch)
        units = [self.loss.num_units(batch) for batch in batches]
        inputs = [
            StepMicroBatch(batch=moved, reference=self._reference(moved), weight=count / sum(units))
            for moved, count in zip([batch.to(self.device) for batch in batches], units, strict=True)
        ]
        return TrainStep(self.model, self.loss, inputs, "two_pass")

    def step(self, inputs: TrainStep) -> None:
        """Run one training step."""
        inputs.run()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def _reference(self, batch: kvpref.Batch) -> kvpref.ResponseLogps | None:
        return kvpref.response_logps(self.model, batch) if self.loss.needs_reference else None


def _rated(group: Group, loss: str) -> Group:
    """Pairs where the loss needs pairs; the first response is the best."""
    sequences = group.sequences[:2] if loss == "dpo" else group.sequences
    labels = [index == 0 for index in range(len(sequences))]
    return Group(sequences, labels=labels, scores=[1.0 - index for index in range(len(sequences))])


@contextmanager
def counted_synchronisations() -> Iterator[Counter[str]]:
    """Counts of waits for the device inside the block, by place; filled when it ends."""
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
