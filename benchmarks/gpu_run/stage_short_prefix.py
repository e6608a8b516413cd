"""The prompt length from which keys and values need no copies: the value for `spread_keys_below`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from attention import AttentionLayer
from llama_models import DRY_RUN, LAYERS_OF_8B
from options import SweepOptions
from workloads import Shape, make_groups

from gpu_run.rows import Figure, Finding, Rows, measured
from kvpref import collate
from kvpref.ops.attention import cascade_attention
from kvpref.ops.attention.spreading import spread_keys_below
from kvpref.profiling.timing import TimingOptions, time_rounds

PROMPTS = (100, 200, 400, 800, 1600)
NUM_RESPONSES = 64


def rows(options: SweepOptions) -> Rows:
    """A single row, because its answer covers all prompts."""
    return {"backward of one prompt with 64 responses": partial(_row, options)}


def _row(options: SweepOptions) -> Finding:
    prompts = PROMPTS[:2] if options.dry_run else PROMPTS
    figures: dict[str, Figure] = {}
    faster = [0]
    for prompt in prompts:
        times = _times(prompt, options)
        figures |= {f"{prompt} tokens {way}": Figure(milliseconds, "ms") for way, milliseconds in times.items()}
        if times["spread"] < times["plain"]:
            faster.append(prompt)
    figures["largest prompt that is faster spread"] = Figure(max(faster), "tokens")
    return measured(figures, reason="nothing is spread on a CPU" if options.device.type != "cuda" else None)


def _times(prompt: int, options: SweepOptions) -> dict[str, float]:
    sizes, response = (DRY_RUN, 2) if options.dry_run else (LAYERS_OF_8B, 128)
    shape = Shape(prompt=prompt, response=response, responses=NUM_RESPONSES)
    batch = collate(make_groups(shape, sizes.vocab_size), device=options.device)
    backward = _backward(AttentionLayer(batch.plan("two_pass"), sizes, options))

    def below(num_keys: int) -> None:
        with spread_keys_below(num_keys):
            backward()

    cases = {"plain": partial(below, 0), "spread": partial(below, prompt + 1)}
    rounds = TimingOptions(num_rounds=2 if options.dry_run else 15, num_warmup=0 if options.dry_run else 3)
    return {name: min(times) for name, times in time_rounds(cases, options.device, rounds).items()}


def _backward(layer: AttentionLayer) -> Callable[[], object]:
    """The backward pass of the responses."""
    prefix, responses = layer.passes
    leaves = (responses.query, responses.key, responses.value, prefix.key, prefix.value)
    out = cascade_attention(*leaves[:3], [leaves[3:]], responses.plan)
    return lambda: torch.autograd.grad(out, leaves, responses.grad, retain_graph=True)
