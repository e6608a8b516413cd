"""Attention alone, forward and backward of one layer: the shared tree against the same tokens unshared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from llama_models import LlamaSizes
from options import SweepOptions
from real_data import real_files
from workloads import VOCABULARIES, Builders, Workload, gpu_attention_grid, grid

from kvpref import collate
from kvpref.ops.attention import AttentionParams, CascadePlan, cascade_attention
from kvpref.plan.flops import AttentionShape, ModelShape, count_work
from kvpref.plan.passes import ModePlan, PassPlan
from kvpref.profiling.compare.comparison import Case, Comparison, compare

TITLE = "attention alone, one layer, forward + backward"
CASES = {"cascade": "two_pass", "unshared": "packed"}


def rows(options: SweepOptions) -> dict[str, Callable[[], Comparison]]:
    """Name -> what measures that row."""
    return {name: partial(_measure, name, build, options) for name, build in _workloads(options).items()}


def _workloads(options: SweepOptions) -> Builders:
    if options.gpu_rows:
        return gpu_attention_grid(options)
    shapes = {name.split()[0]: build for name, build in grid(options, {"1k": VOCABULARIES["1k"]}).items()}
    # Elsewhere attention is a small part of the step.
    long = {name: build for name, build in real_files(options).items() if name.startswith(("game24", "squality"))}
    return shapes | long


def _measure(name: str, build: Callable[[], Workload], options: SweepOptions) -> Comparison:
    workload = build()
    batch = collate(workload.cuts["two_pass"][0], device=options.device)
    cases = [_case(case, batch.plan(mode), workload.sizes, options) for case, mode in CASES.items()]
    results = compare(
        cases, baseline="unshared", device=options.device, options=options.timing, with_memory=options.with_memory
    )
    # On a CPU the bars apply to whole steps; rows of attention alone show where time goes.
    return Comparison(
        name=name,
        baseline="unshared",
        results=results,
        facts={"num_heads": workload.sizes.num_heads, "num_kv_heads": workload.sizes.num_kv_heads},
        bar=workload.bar if options.gpu_rows else None,
    )


def _case(name: str, plan: ModePlan, sizes: LlamaSizes, options: SweepOptions) -> Case:
    work = count_work(plan)
    layer = ModelShape(
        linear_weights=0,
        attention=(
            AttentionShape(
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                value_dim=sizes.head_dim,
            ),
        ),
        hidden_size=sizes.hidden_size,
        vocab_size=sizes.vocab_size,
    )
    case = Case(
        name=name,
        run=AttentionLayer(plan, sizes, options).run,
        flops=layer.flops(work).attention,
        facts={"tokens": work.num_tokens, "attention_pairs": work.num_pairs},
    )
    case.run()  # warm-up
    return case


class AttentionLayer:
    """Random queries, keys and values for every pass of a plan, and a gradient of the output."""

    def __init__(self, plan: ModePlan, sizes: LlamaSizes, options: SweepOptions) -> None:
        self.passes = [_PassTensors(item, sizes, options) for item in plan.passes]

    def run(self) -> None:
        """Forward over all passes, later ones reading the keys and values of earlier ones, then backward."""
        outs: list[torch.Tensor] = []
        prefixes: list[tuple[torch.Tensor, torch.Tensor]] = []
        for item in self.passes:
            outs.append(cascade_attention(item.query, item.key, item.value, prefixes, item.plan))
            prefixes.append((item.key, item.value))
        torch.autograd.backward(outs, [item.grad for item in self.passes])
        for item in self.passes:
            item.query.grad = item.key.grad = item.value.grad = None


class _PassTensors:
    """Leaves (T, H, D) and (T, G, D) of one pass."""

    def __init__(self, item: PassPlan, sizes: LlamaSizes, options: SweepOptions) -> None:
        (level,) = item.levels
        generator = torch.Generator(options.device).manual_seed(level.num_rows)

        def random(num_heads: int) -> torch.Tensor:
            shape = (level.num_rows, num_heads, sizes.head_dim)
            return torch.randn(shape, generator=generator, device=options.device, dtype=options.dtype)

        self.query = random(sizes.num_heads).requires_grad_()
        self.key, self.value = random(sizes.num_kv_heads).requires_grad_(), random(sizes.num_kv_heads).requires_grad_()
        self.grad = random(sizes.num_heads)
        self.plan = CascadePlan(
            blocks=level.blocks,
            params=AttentionParams(scale=sizes.head_dim**-0.5),
            backend=options.backend,
        )
