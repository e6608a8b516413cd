"""Speed-ups over mode `packed` on the same kernels, and memory, against their bars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import attention
import forward_backward
import torch
from llama_models import DRY_RUN, LAYERS_OF_8B, LlamaSizes, build_model
from options import SweepOptions
from workloads import Shape, make_groups

import kvpref
from gpu_run.rows import Figure, Finding, Rows, judged, measured, skipped
from gpu_run.working_backends import NEWER_GENERATIONS, refusal
from kvpref.ops.attention import select_backend
from kvpref.profiling.compare.comparison import Comparison
from kvpref.profiling.memory.peak import peak_bytes

PUBLISHED = {"4096/2048/28": 1.62, "16384/2048/28": 3.74, "32768/2048/28": 6.00}
"""What DualKV reports of attention alone (see `workloads.GPU_ATTENTION_GRID`): to be passed."""
MEANT_FOR_BYTES = 130 * 2**30
"""The unshared tokens of the longest prompts, 28 times, fill such a card."""
MOST_GROWTH = 1.10
"""Of the peak in schedule `bounded`, from 8 responses to 64."""


def rows(options: SweepOptions) -> Rows:
    """Whole models, attention alone, memory; then the rows without a bar of their own, and newer kernels."""
    models, alone = forward_backward.rows(options), attention.rows(options)
    found: Rows = {f"model {name}": partial(_row, measure, options) for name, measure in models.items()}
    found |= {f"attention {name}": partial(_row, alone[name], options) for name in PUBLISHED}
    found |= {
        "bytes of prefixes": partial(_prefix_bytes, options),
        "bounded with 64 responses": partial(_bounded_peak, options),
    }
    generations = [name for name in ("cuda_flash", *NEWER_GENERATIONS) if refusal(name, options) is None]
    for backend in (name for name in generations if name != _chosen(options)):
        there = replace(options, backend=backend)
        models, alone = forward_backward.rows(there), attention.rows(there)
        found |= {f"{backend}: model {name}": partial(_row, measure, there) for name, measure in models.items()}
        found |= {f"{backend}: attention {name}": partial(_row, alone[name], there) for name in PUBLISHED}
    alone = attention.rows(options)
    others = [name for name in alone if name not in PUBLISHED]
    return found | {f"attention {name}": partial(_row, alone[name], options) for name in others}


def _row(measure: Callable[[], Comparison], options: SweepOptions) -> Finding:
    try:
        comparison = measure()
    except torch.OutOfMemoryError:
        memory = torch.cuda.get_device_properties(options.device).total_memory
        if memory >= MEANT_FOR_BYTES:
            raise
        return skipped(f"out of memory with {memory / 2**30:.0f} GiB; the row is for a card with 130")
    (result,) = comparison.contenders()
    baseline = next(item for item in comparison.results if item.name == comparison.baseline)
    figures = {
        "speed-up": Figure(result.speedup.median, "x"),
        "ideal": Figure(result.ideal, "x"),
        "efficiency": Figure(result.efficiency.median, ""),
        "time": Figure(result.time_ms.median, "ms"),
        f"time ({baseline.name})": Figure(baseline.time_ms.median, "ms"),
        "rate": Figure(result.flops / result.time_ms.median / 1e9, "TFLOP/s"),
    }
    if result.peak_bytes is not None and baseline.peak_bytes is not None:
        figures["peak"] = Figure(result.peak_bytes / 2**20, "MiB")
        figures[f"peak ({baseline.name})"] = Figure(baseline.peak_bytes / 2**20, "MiB")
    reason = f"backend {_chosen(options)}"
    if comparison.bar is None:
        return measured(figures, reason=reason)
    bar, met = f"efficiency of at least {comparison.bar:.2f}", result.efficiency.median >= comparison.bar
    if comparison.name in PUBLISHED:
        bar += f", speed-up above {PUBLISHED[comparison.name]:.2f}x"
        met = met and result.speedup.median > PUBLISHED[comparison.name]
    return judged(met=met, bar=bar, figures=figures, reason=reason)


def _chosen(options: SweepOptions) -> str:
    query = torch.empty(1, 1, LAYERS_OF_8B.head_dim, dtype=options.dtype, device=options.device)
    return select_backend(options.backend, query).name


def _sizes(options: SweepOptions) -> LlamaSizes:
    return DRY_RUN if options.dry_run else LAYERS_OF_8B


def _prefix_bytes(options: SweepOptions) -> Finding:
    """Memory held for two prompts, compared with that of their unique tokens."""
    sizes = _sizes(options)
    prompt = 32 if options.dry_run else 4096
    groups = make_groups(Shape(prompt=prompt, response=8, responses=4, groups=2), sizes.vocab_size)
    cache = kvpref.encode_prefix(build_model(sizes, options), kvpref.collate(groups, device=options.device))
    tensors = [tensor for layer in cache.layers for slab in layer.slabs for tensor in slab]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    held = sum(storage.nbytes() for storage in storages.values())
    expected = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * 2 * prompt * options.dtype.itemsize
    return judged(
        met=held == expected == cache.num_bytes,
        bar="2 x layers x kv heads x head dim x unique tokens x bytes per element",
        figures={"held": Figure(held, "bytes"), "expected": Figure(expected, "bytes")},
    )


def _bounded_peak(options: SweepOptions) -> Finding:
    """Check that the peak does not grow with the number of responses."""
    sizes = _sizes(options)
    prompt, response, chunk = (32, 4, 16) if options.dry_run else (4096, 512, 4096)
    model = build_model(sizes, options)
    counts = (8, 64)
    peaks = {count: _peak(model, Shape(prompt=prompt, response=response, responses=count), chunk) for count in counts}
    growth = peaks[64] / peaks[8]
    return judged(
        met=growth <= MOST_GROWTH or options.dry_run,
        bar=f"at most {MOST_GROWTH:.2f} times the peak of 8 responses",
        figures={f"peak with {count}": Figure(peak / 2**20, "MiB") for count, peak in peaks.items()}
        | {"ratio": Figure(growth, "")},
        reason="tiny models hold more for a loss than for layers" if options.dry_run else None,
    )


def _peak(model: torch.nn.Module, shape: Shape, chunk: int) -> int:
    device = next(model.parameters()).device
    batch = kvpref.collate(make_groups(shape, model.config.vocab_size), device=device)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        kvpref.forward_backward(model, batch, forward_backward.mean_nll, schedule="bounded", max_tokens_per_chunk=chunk)

    run()  # workspaces, and kernels that load
    return peak_bytes(run, device, sum(parameter.nbytes for parameter in model.parameters()))
