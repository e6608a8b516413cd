"""Random blocks of every shape, and dense attention over what they say, from their definition alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from kvpref.prefix.blocks import Shape, VarlenLayout

SHAPES: tuple[Shape, ...] = ("rectangle", "causal", "anti_causal")


def cut(generator: random.Random, total: int, longest: int) -> list[int]:
    """Lengths that add up to `total`."""
    lengths = []
    while total:
        lengths.append(generator.randint(1, min(longest, total)))
        total -= lengths[-1]
    return lengths


def self_layout(generator: random.Random, num_rows: int, window: int | None = None, longest: int = 23) -> VarlenLayout:
    """Packed segments over themselves."""
    own = (0, *accumulate(cut(generator, num_rows, longest)))
    return VarlenLayout(cu_seqlens_q=own, cu_seqlens_k=own, shape="causal", window=window)


def layout_with_ranges(
    generator: random.Random, shape: Shape, num_queries: int, num_rows: int, source: int, longest: int = 12
) -> VarlenLayout:
    """Pairs whose key ranges overlap, in any order; some without keys."""
    queries = cut(generator, num_queries, longest)
    keys, starts = [], []
    for length in queries:
        wanted = generator.randint(1, longest) if shape == "rectangle" else length
        keys.append(wanted if wanted <= num_rows and generator.random() < 0.8 else 0)
        starts.append(generator.randint(0, num_rows - keys[-1]))
    return VarlenLayout(
        cu_seqlens_q=(0, *accumulate(queries)),
        cu_seqlens_k=(0, *accumulate(keys)),
        shape=shape,
        source=source,
        key_starts=tuple(starts),
    )


def layout_in_order(generator: random.Random, shape: Shape, num_queries: int, source: int) -> tuple[VarlenLayout, int]:
    """Pairs whose key ranges follow one another, between them pairs without queries or keys; and all rows."""
    queries, keys = [], []
    for length in cut(generator, num_queries, 12):
        if generator.random() < 0.3:
            queries.append(0)
            keys.append(generator.randint(0, 3))
        queries.append(length)
        wanted = generator.randint(1, 9) if shape == "rectangle" else length
        keys.append(wanted if generator.random() < 0.8 else 0)
    offsets = [(0, *accumulate(lengths)) for lengths in (queries, keys)]
    layout = VarlenLayout(cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], shape=shape, source=source)
    return layout, offsets[1][-1]


def counts(layouts: Sequence[VarlenLayout], num_rows: Sequence[int]) -> torch.Tensor:
    """(T, rows of all sources) how often each query sees each key."""
    bases = (0, *accumulate(num_rows))
    found = torch.zeros(num_rows[0], bases[-1], dtype=torch.float64)
    for layout in layouts:
        spans = zip(pairwise(layout.cu_seqlens_q), pairwise(layout.cu_seqlens_k), strict=True)
        for number, ((q0, q1), (k0, k1)) in enumerate(spans):
            start = k0 if layout.key_starts is None else layout.key_starts[number]
            for i in range(q1 - q0):
                for j in range(k1 - k0):
                    seen = {"rectangle": True, "causal": j <= i, "anti_causal": j >= i}[layout.shape]
                    if seen and (layout.window is None or i - j < layout.window):
                        found[q0 + i, bases[layout.source] + start + j] += 1
    return found


def attend(
    query: torch.Tensor,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    seen: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """(T, H, E): softmax over all sources at once, a key that is seen twice counts twice; 0 for rows that see none."""
    ratio = query.shape[1] // pairs[0][0].shape[1]
    key, value = (torch.cat(parts).repeat_interleave(ratio, dim=1) for parts in zip(*pairs, strict=True))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.exp(scores) * seen.to(scores.dtype)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink.to(scores.dtype))[:, None, None]
    return torch.einsum("hqk,khd->qhd", weights / total.where(total > 0, 1.0), value)
