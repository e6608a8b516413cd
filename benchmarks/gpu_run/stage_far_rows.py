"""Pairs whose gradients start beyond a 32-bit offset, with canaries around them.

FlashAttention-2's backward adds up dq in a buffer of heads x head dim (rounded up to 32) elements a row; some releases
compute a pair's place in it in 32 bits, so from 2^31 elements on they write elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from attention_errors import Errors, differentiated, errors_of_results
from dense_attention import Inputs
from options import SweepOptions

from gpu_run.rows import Figure, Finding, Rows, judged
from gpu_run.working_backends import FLASH_ATTENTION_2, fast_backends
from kvpref.ops.attention import AttentionParams, CascadePlan, VarlenBlock, cascade_attention
from kvpref.prefix.blocks import VarlenLayout

CANARY = 0x5EED


@dataclass(frozen=True, kw_only=True)
class FarShape:
    """Pairs of equal length."""

    num_pairs: int
    """Segments, each with a prefix of its own where there are prefixes."""

    queries: int
    """Rows per segment."""

    keys: int
    """Rows per prefix."""

    heads: int
    """Query heads."""

    kv_heads: int
    """Key/value heads."""

    head_dim: int
    """Elements per head."""

    canary_bytes: int
    """Of each canary."""

    @property
    def first_far_pair(self) -> int:
        """Index of the first pair that starts beyond 2^31 elements; past the end where none does."""
        row_elements = self.heads * -(-self.head_dim // 32) * 32
        return -(-(2**31) // (row_elements * self.queries))


FULL = FarShape(num_pairs=560, queries=512, keys=64, heads=64, kv_heads=8, head_dim=128, canary_bytes=2**29)
TINY = FarShape(num_pairs=6, queries=16, keys=4, heads=4, kv_heads=2, head_dim=16, canary_bytes=2**10)


class Results(NamedTuple):
    """Output and gradients of the whole call."""

    inputs: Inputs
    dout: torch.Tensor
    found: list[torch.Tensor]


def rows(options: SweepOptions) -> Rows:
    """Every FlashAttention-2 that works here: segments alone, then with prefixes."""
    names = [name for name in fast_backends(options) if name in FLASH_ATTENTION_2 or options.dry_run]
    return {
        f"{name} {'and prefixes' if across else 'alone'}": partial(_row, name, across, options)
        for across in (False, True)
        for name in names
    }


def _row(backend: str, across: bool, options: SweepOptions) -> Finding:
    shape = TINY if options.dry_run else FULL
    canaries = [_canary(shape, options) for _ in range(4)]
    results = _whole_call(shape, backend, across, options, canaries)
    sampled = sorted({0, shape.num_pairs // 2, shape.num_pairs - 1} | _around(shape))
    errors = [(pair, error) for pair in sampled for error in _pair_errors(shape, pair, results)]
    wrong = [f"pair {pair}: {error.name} {error.found:.1e}" for pair, error in errors if not error.is_fine]
    harmed = sum(int((canary != CANARY).sum()) for canary in canaries)
    if harmed:
        wrong.append(f"{harmed} canaries were written over")
    start = shape.first_far_pair * shape.queries
    return judged(
        met=not wrong,
        bar="sampled pairs as exact as alone, canaries unharmed",
        figures={
            "largest error": Figure(max(error.found for _, error in errors), ""),
            "rows": Figure(shape.num_pairs * shape.queries, ""),
            "rows from the bound on": Figure(max(0, shape.num_pairs * shape.queries - start), ""),
        },
        reason="; ".join(wrong[:3]) or ("too small to reach the bound" if options.dry_run else None),
    )


def _whole_call(
    shape: FarShape, backend: str, across: bool, options: SweepOptions, canaries: list[torch.Tensor]
) -> Results:
    """All pairs in one call of the operator; adds canaries between its tensors."""
    generator = torch.Generator(options.device).manual_seed(0)

    def random(rows: int, heads: int) -> torch.Tensor:
        canaries.append(_canary(shape, options))
        size = (rows, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=options.device, dtype=options.dtype)

    num_rows = shape.num_pairs * shape.queries
    num_prefixes = 1 if across else 0
    inputs = Inputs(
        random(num_rows, shape.heads).requires_grad_(),
        random(num_rows, shape.kv_heads).requires_grad_(),
        random(num_rows, shape.kv_heads).requires_grad_(),
        [_prefix(random, shape) for _ in range(num_prefixes)],
    )
    dout = random(num_rows, shape.heads)
    plan = _plan(shape, shape.num_pairs, num_prefixes, backend, options.device)

    def call(given: Inputs) -> torch.Tensor:
        return cascade_attention(given.query, given.key, given.value, given.prefixes, plan)

    return Results(inputs, dout, differentiated(call, inputs, dout))


def _prefix(random: Callable[[int, int], torch.Tensor], shape: FarShape) -> tuple[torch.Tensor, torch.Tensor]:
    count = shape.num_pairs * shape.keys
    return random(count, shape.kv_heads).requires_grad_(), random(count, shape.kv_heads).requires_grad_()


def _plan(shape: FarShape, num_pairs: int, num_prefixes: int, backend: str, device: torch.device) -> CascadePlan:
    queries, keys = (tuple(range(0, num_pairs * size + 1, size)) for size in (shape.queries, shape.keys))
    own = VarlenLayout(cu_seqlens_q=queries, cu_seqlens_k=queries, shape="causal")
    across = VarlenLayout(cu_seqlens_q=queries, cu_seqlens_k=keys, shape="rectangle")
    return CascadePlan(
        blocks=(
            VarlenBlock.from_layout(own, device),
            *(VarlenBlock.from_layout(replace(across, source=index + 1), device) for index in range(num_prefixes)),
        ),
        params=AttentionParams(scale=shape.head_dim**-0.5),
        backend=backend,
    )


def _pair_errors(shape: FarShape, pair: int, results: Results) -> list[Errors]:
    """Compare one pair of the whole call with dense attention over that pair alone."""
    own = slice(pair * shape.queries, (pair + 1) * shape.queries)
    prefix = slice(pair * shape.keys, (pair + 1) * shape.keys)
    given = results.inputs
    alone = Inputs(
        given.query[own],
        given.key[own],
        given.value[own],
        [(key[prefix], value[prefix]) for key, value in given.prefixes],
    )
    found = [tensor[own] for tensor in results.found[:4]] + [tensor[prefix] for tensor in results.found[4:]]
    return errors_of_results(found, _dense, alone, results.dout[own], str(given.query.device))


def _dense(inputs: Inputs) -> torch.Tensor:
    """A causal segment after its prefix."""
    ratio = inputs.query.shape[1] // inputs.key.shape[1]
    keys = torch.cat([*(key for key, _ in inputs.prefixes), inputs.key]).repeat_interleave(ratio, dim=1)
    values = torch.cat([*(value for _, value in inputs.prefixes), inputs.value]).repeat_interleave(ratio, dim=1)
    scores = torch.einsum("qhd,khd->hqk", inputs.query, keys) * inputs.query.shape[-1] ** -0.5
    num_queries, num_keys = scores.shape[1:]
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device).triu(num_keys - num_queries + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


def _around(shape: FarShape) -> set[int]:
    """The pairs on both sides of the bound, and a later one."""
    pairs = {shape.first_far_pair + step for step in (-1, 0, 1, 3)}
    return {pair for pair in pairs if 0 <= pair < shape.num_pairs}


def _canary(shape: FarShape, options: SweepOptions) -> torch.Tensor:
    return torch.full((shape.canary_bytes // 4,), CANARY, dtype=torch.int32, device=options.device)
