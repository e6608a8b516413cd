"""`compile_layers` on a model of real width."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import oracle
import torch
from forward_backward import mean_nll
from llama_models import DRY_RUN, LAYERS_OF_8B, build_model
from options import SweepOptions
from workloads import Shape, make_groups

import kvpref
from gpu_run.rows import Figure, Finding, Rows, judged
from kvpref.profiling.timing import TimingOptions, time_rounds


def rows(options: SweepOptions) -> Rows:
    """Compare forward and backward with compiled and plain layers."""
    return {"forward + backward": partial(_row, options)}


def _row(options: SweepOptions) -> Finding:
    sizes = DRY_RUN if options.dry_run else replace(LAYERS_OF_8B, num_layers=2)
    length = 32 if options.dry_run else 1024
    groups = make_groups(Shape(prompt=length, response=length // 8, responses=4), sizes.vocab_size)
    batch = kvpref.collate(groups, device=options.device)
    plain, compiled = build_model(sizes, options), build_model(sizes, options)
    # Code for the processor takes long to generate; tracing is what a dry run shows.
    kvpref.compile_layers(compiled, **({"backend": "aot_eager"} if options.dry_run else {}))
    models = {"plain": plain, "compiled": compiled}

    def run(name: str) -> torch.Tensor:
        models[name].zero_grad(set_to_none=True)
        return kvpref.forward_backward(models[name], batch, mean_nll).loss

    losses = {name: run(name) for name in models}
    gradients = {name: oracle.grads_of(model) for name, model in models.items()}
    errors = {
        name: oracle.relative_error(gradients["compiled"][name], grad)
        for name, grad in gradients["plain"].items()
        if grad.ndim > 1
    }
    worst = max(errors, key=lambda name: errors[name])
    rounds = TimingOptions(num_rounds=2 if options.dry_run else 7, num_warmup=0 if options.dry_run else 2)
    times = time_rounds({name: partial(run, name) for name in models}, options.device, rounds)
    allowed = 8 * torch.finfo(options.dtype).eps if options.dtype == torch.bfloat16 else 1e-4
    return judged(
        met=errors[worst] <= allowed and abs(float(losses["plain"] - losses["compiled"])) <= allowed,
        bar=f"gradients of plain layers to {allowed:.1g}",
        figures={f"time ({name})": Figure(min(times[name]), "ms") for name in models}
        | {"largest difference": Figure(errors[worst], "")},
        reason=f"largest at {worst}",
    )
