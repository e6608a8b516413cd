"""The training steps of `kvpref profile time`, and the profiler around them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from kvpref.engine.options import EngineOptions
from kvpref.engine.schedules import forward_backward, forward_backward_step
from kvpref.losses import LossFunction, PreferenceLoss
from kvpref.plan.batch import collate
from kvpref.plan.step import join_batches
from kvpref.profiling.quiet_profiler import quiet_profile
from kvpref.profiling.step_time.profile import STEP, Event, attribute
from kvpref.profiling.step_time.report import TimeProfile
from kvpref.profiling.steps import make_micro_batches
from kvpref.records.groups import Group
from kvpref.tracing import region


class TimedStep:
    """An optimizer step with everything that training does in it: collation, forward, backward, optimizer.

    Args:
        model: Attached model, in training mode, on its device.
        loss: As for `kvpref.forward_backward`. Reference log-probs are computed here, once.
        optimizer: Steps at the end.
        cut: The groups of each micro-batch.
        options: How forward and backward run.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PreferenceLoss | LossFunction,
        optimizer: torch.optim.Optimizer,
        cut: Sequence[Sequence[Group]],
        options: EngineOptions,
    ) -> None:
        self.model, self.loss, self.optimizer, self.cut, self.options = model, loss, optimizer, cut, options
        self.device = next(model.parameters()).device
        prepared = make_micro_batches(model, cut, loss, mode=options.mode, device=self.device)
        self.references = [item.reference for item in prepared]
        self.weights = [item.weight for item in prepared]
        batches = [item.batch for item in prepared]
        self.facts = {
            "num_micro_batches": len(batches),
            "num_sequences": sum(batch.num_sequences for batch in batches),
            "total_tokens": sum(batch.num_total_tokens for batch in batches),
            "unique_tokens": sum(batch.num_unique_tokens for batch in batches),
        }

    def run(self) -> None:
        """One step; returns when the device is done."""
        self.optimizer.zero_grad(set_to_none=True)
        with region("data"):
            batches = [collate(groups, modes=(self.options.mode,)).to(self.device) for groups in self.cut]
            joined = self.options.runs_chunks and join_batches(
                batches, max_tokens_per_chunk=self.options.chunk_tokens, prefix_grad=self.options.prefix_grad
            )
        if joined:
            forward_backward_step(
                self.model, joined, self.loss, self.options, references=self.references, backward=self._backward
            )
        else:
            for index, (batch, reference) in enumerate(zip(batches, self.references, strict=True)):
                backward = partial(self._backward, index=index)
                forward_backward(self.model, batch, self.loss, self.options, reference=reference, backward=backward)
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _backward(self, loss: torch.Tensor, index: int) -> None:
        (loss * self.weights[index]).backward()  # type: ignore[no-untyped-call]


def profile_time(step: TimedStep, num_steps: int, trace: Path | None = None) -> TimeProfile:
    """Run steps under the profiler and sum their time by pass and part.

    One step warms up, and as many as are profiled are also timed without the profiler, which slows them down.

    Args:
        step: The step to run.
        num_steps: Steps to profile, at least one.
        trace: Where to write a Chrome trace (chrome://tracing, ui.perfetto.dev), in a folder that exists.
    """
    on_cuda = step.device.type == "cuda"
    step.run()
    started = time.perf_counter()
    for _ in range(num_steps):
        step.run()
    plain_ms = (time.perf_counter() - started) * 1000 / num_steps
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with quiet_profile(activities) as profiler:
        for _ in range(num_steps):
            with record_function(STEP):
                step.run()
    roots = [event for event in profiler.events() or () if event.cpu_parent is None and _is_on_host(event)]
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return TimeProfile(
        clock="CUDA kernels" if on_cuda else "CPU",
        num_steps=num_steps,
        entries=attribute(roots, _kernel_time if on_cuda else _cpu_time, num_steps),
        profiled_ms=sum(root.cpu_time_total for root in roots if root.name == STEP) / 1000 / num_steps,
        plain_ms=plain_ms,
    )


def _is_on_host(event: Any) -> bool:
    # Ranges also appear under the same name on the device's timeline.
    return event.device_type == torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]


def _cpu_time(event: Event) -> float:
    return event.self_cpu_time_total  # type: ignore[attr-defined, no-any-return]


def _kernel_time(event: Event) -> float:
    # A range starts no kernel, but its copy on the device may count as one.
    return 0.0 if event.is_user_annotation else event.self_device_time_total  # type: ignore[attr-defined]
