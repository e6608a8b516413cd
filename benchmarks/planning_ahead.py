"""What loading and planning ahead costs the training process, in a thread or in a data worker.

    python benchmarks/planning_ahead.py                     # a table, and JSON on the last line
    python benchmarks/planning_ahead.py --schedule bounded
    python benchmarks/planning_ahead.py --dry-run

A training step of a tiny model is Python that launches operators, like that of a GPU's host, so anything else under
the interpreter's lock delays it. The same steps run with batches that are ready, made in a thread, and in a worker,
one way after the other in one process. Wall time needs two idle cores; the CPU time of the training process, over all
its threads, shows on any machine what work remains there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from llama_models import DRY_RUN, build_model
from options import SweepOptions
from workloads import Shape, make_groups

from kvpref import PreferenceTrainingArguments
from kvpref.data import PreferenceDataset
from kvpref.engine.schedules import forward_backward, forward_backward_step
from kvpref.profiling.provenance import Provenance
from kvpref.training.loading.batcher import make_batcher
from kvpref.training.loading.inputs import StepInputs
from kvpref.training.loading.loader import make_loader

WAYS = {"ready": None, "thread": 0, "worker": 1}
"""Name -> data workers; None makes all batches before the first step."""

SHAPE = Shape(prompt=500, response=100, responses=16, groups=8)
"""The shape of one step."""

WARM_UP = 2
"""First steps, not counted: nothing was made ahead of them."""


def steps_of(way: str, num_steps: int, shape: Shape, vocab_size: int, args: Any) -> Iterator[StepInputs]:
    """The steps, made as `way` says."""
    groups = [group for seed in range(num_steps) for group in make_groups(shape, vocab_size, seed=seed)]
    dataset = PreferenceDataset(groups)
    args.dataloader_num_workers = WAYS[way] or 0
    batcher = make_batcher(dataset, args, groups_per_device=shape.groups, shuffle=False)
    loader = make_loader(dataset, batcher, args)
    return iter(list(loader)) if WAYS[way] is None else iter(loader)


def run_step(model: torch.nn.Module, step: StepInputs, args: Any) -> None:
    """Forward and backward of a step, as the trainer runs it."""
    options, loss = args.engine_options(), args.make_loss()
    for joined in step.joined:
        forward_backward_step(
            model,
            joined,
            loss,
            options,
            references=[None] * len(joined.batches),
            backward=lambda total, _: total.backward(),
        )
    if not step.joined:
        for item in step:
            forward_backward(model, item.batch, loss, options)
    model.zero_grad()


def measure(options: SweepOptions, schedule: str, num_steps: int) -> dict[str, Any]:
    """Milliseconds per step for each way, from requesting the step to its gradients."""
    shape = Shape(prompt=24, response=3, responses=2, groups=2) if options.dry_run else SHAPE
    model = build_model(DRY_RUN, options)
    clocks = {"wall": time.perf_counter, "process": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {way: {name: [] for name in clocks} for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        args = PreferenceTrainingArguments(output_dir=folder, loss="sft", schedule=schedule, use_cpu=True)
        for way in WAYS:
            steps = steps_of(way, num_steps, shape, DRY_RUN.vocab_size, args)
            for number in range(num_steps):
                begun = {name: clock() for name, clock in clocks.items()}
                run_step(model, next(steps), args)
                if number >= WARM_UP:
                    for name, clock in clocks.items():
                        seconds[way][name].append(clock() - begun[name])
    return {
        "schedule": schedule,
        "shape": shape.name,
        "ms_per_step": {way: {name: 1000 * median(own[name]) for name in clocks} for way, own in seconds.items()},
        "rounds_s": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", choices=("full", "bounded"), default="full")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dry-run", action="store_true", help="tiny, seconds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = SweepOptions(device=torch.device("cpu"), quick=False, dry_run=args.dry_run, shared=None, clock="wall")
    found = measure(options, args.schedule, WARM_UP + (2 if args.dry_run else args.steps))
    ready = found["ms_per_step"]["ready"]
    for way, spent in found["ms_per_step"].items():
        ratios = ", ".join(f"{name} {ms:.1f} ms ({ms / ready[name]:.2f}x)" for name, ms in spent.items())
        print(f"{way:7} per step: {ratios}; x: of a step whose batches are ready, ideal 1")
    print(json.dumps(found | {"provenance": asdict(Provenance.collect(options.device))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
