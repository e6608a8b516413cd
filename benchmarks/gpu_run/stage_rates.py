"""Rates of attention's parts, held to 0.6 of what plain matrix products reach on the same card."""

from __future__ import annotations

from functools import cache, partial

import torch
from options import SweepOptions

from gpu_run.attention_calls import TimedBlock
from gpu_run.rows import Figure, Finding, Rows, measured
from gpu_run.working_backends import fast_backends
from kvpref.ops.attention.merge import add_gradient, merge_partials
from kvpref.prefix.blocks import VarlenLayout
from kvpref.profiling.matrix_rate import measure_matrix_rate
from kvpref.profiling.timing import TimingOptions, time_rounds

SHARE = 0.6
"""Of the rate of matrix products, or of copying memory."""


def rows(options: SweepOptions) -> Rows:
    """One row per fast backend, then the steps around its calls."""
    found: Rows = {"matrix products": partial(_matrix_row, options)}
    for name in sorted(fast_backends(options), key=lambda name: name == "flash_attn_4"):
        found[name] = partial(_backend_row, name, options)
    return found | {"merge": partial(_merge_row, options)}


def layouts(options: SweepOptions) -> dict[str, VarlenLayout]:
    """Segments over themselves, and sixteen responses over one prompt."""
    shrink = 64 if options.dry_run else 1
    own = tuple(range(0, 32768 // shrink + 1, 4096 // shrink))
    return {
        "self": VarlenLayout(cu_seqlens_q=own, cu_seqlens_k=own, shape="causal"),
        "cross": VarlenLayout(cu_seqlens_q=(0, 16384 // shrink), cu_seqlens_k=(0, 8192 // shrink), shape="rectangle"),
    }


@cache
def _matrix_rate(options: SweepOptions) -> float:
    return measure_matrix_rate(options.device, options.dtype)


def _matrix_row(options: SweepOptions) -> Finding:
    return measured({"rate": Figure(_matrix_rate(options) / 1e12, "TFLOP/s")})


def _backend_row(name: str, options: SweepOptions) -> Finding:
    figures = {}
    for part, layout in layouts(options).items():
        block = TimedBlock(name, layout, options)
        times = time_rounds({"forward": block.forward, "backward": block.backward}, options.device, _timing(options))
        for way, flops in block.flops.items():
            figures[f"{part} {way}"] = Figure(flops / min(times[way]) / 1e9, "TFLOP/s")
    wanted = SHARE * _matrix_rate(options) / 1e12
    below = [part for part, figure in figures.items() if figure.value < wanted]
    return measured(
        figures,
        bar=f"{SHARE} of matrix products: {wanted:.4g} TFLOP/s",
        reason=f"below: {', '.join(below)}" if below else "all above",
    )


def _merge_row(options: SweepOptions) -> Finding:
    """Memory-bound steps: bytes per second, compared with a copy."""
    num_rows, heads, head_dim = (64, 4, 32) if options.dry_run else (32768, 32, 128)
    generator = torch.Generator(options.device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = options.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=options.device, dtype=dtype)

    outs = [random(num_rows, heads, head_dim) for _ in range(2)]
    lses = [random(heads, num_rows, dtype=torch.float32) for _ in range(2)]
    cases = {
        "copy": lambda: outs[0].clone(),
        "merge forward": lambda: merge_partials((outs[0], lses[0]), (outs[1], lses[1]), options.dtype),
        "merge backward": lambda: add_gradient(outs[0], outs[1], is_last=True),
    }
    times = time_rounds(cases, options.device, _timing(options))
    moved = {"copy": 2, "merge forward": 3, "merge backward": 3}  # tensors read and written
    figures = {name: Figure(count * outs[0].nbytes / min(times[name]) / 1e6, "GB/s") for name, count in moved.items()}
    wanted = SHARE * figures["copy"].value
    below = [name for name, figure in figures.items() if figure.value < wanted]
    return measured(
        figures,
        bar=f"{SHARE} of a copy: {wanted:.4g} GB/s",
        reason=f"below: {', '.join(below)}" if below else "all above",
    )


def _timing(options: SweepOptions) -> TimingOptions:
    return TimingOptions(num_rounds=2 if options.dry_run else 7, num_warmup=0 if options.dry_run else 2)
