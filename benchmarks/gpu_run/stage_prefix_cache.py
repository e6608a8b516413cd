"""Schedule `bounded` with the prefixes' keys and values in host memory, against those on the device."""

from __future__ import annotations

from functools import partial

from forward_backward import mean_nll
from llama_models import DRY_RUN, LlamaSizes, build_model
from options import SweepOptions
from workloads import Shape, make_groups

from gpu_run.rows import Figure, Finding, Rows, judged, measured
from kvpref import collate, forward_backward
from kvpref.profiling.memory.peak import peak_bytes
from kvpref.profiling.timing import TimingOptions, time_rounds

PLACES = ("device", "cpu")
SIZES = LlamaSizes(
    hidden_size=2048, intermediate_size=4096, num_layers=12, num_heads=16, num_kv_heads=8, vocab_size=4096
)
"""Many layers, whose keys and values weigh more than the weights."""


def rows(options: SweepOptions) -> Rows:
    """One row for a long prompt, and one for a prompt that is computed faster than it is copied."""
    prompts = (64, 32) if options.dry_run else (32768, 4096)
    return {f"prompt of {prompt} tokens": partial(_row, prompt, options) for prompt in prompts}


def _row(prompt: int, options: SweepOptions) -> Finding:
    sizes, response, chunk = (DRY_RUN, 4, 16) if options.dry_run else (SIZES, 256, 2048)
    model = build_model(sizes, options)
    shape = Shape(prompt=prompt, response=response, responses=8)
    batch = collate(make_groups(shape, sizes.vocab_size), device=options.device)

    def run(place: str) -> None:
        model.zero_grad(set_to_none=True)
        forward_backward(model, batch, mean_nll, schedule="bounded", max_tokens_per_chunk=chunk, prefix_cache=place)

    cases = {place: partial(run, place) for place in PLACES}
    for case in cases.values():
        case()  # warm-up
    times = time_rounds(cases, options.device, TimingOptions(num_rounds=2, num_warmup=0))
    figures = {f"time ({place})": Figure(min(times[place]), "ms") for place in PLACES}
    if not options.with_memory:
        return measured(figures, reason="memory is measured on CUDA devices only")
    peaks = {place: peak_bytes(case, options.device, 0) for place, case in cases.items()}
    figures |= {f"peak ({place})": Figure(peaks[place] / 2**20, "MiB") for place in PLACES}
    saved = peaks["device"] - peaks["cpu"]
    return judged(
        met=saved >= least_saved_bytes(sizes, prompt),
        bar=f"saves the prompt's keys and values of all layers but {LAYERS_LEFT}, and their gradients",
        figures=figures | {"saved": Figure(saved / 2**20, "MiB")},
    )


LAYERS_LEFT = 3
"""Layers whose keys and values may be on the device at once: one in use, one arriving, one leaving."""


def least_saved_bytes(sizes: LlamaSizes, prompt: int) -> int:
    """Bytes of keys and values in 16 bits, and of their gradients in fp32, of the idle layers."""
    elements = 2 * sizes.num_kv_heads * sizes.head_dim * prompt * (sizes.num_layers - LAYERS_LEFT)
    return elements * (2 + 4)
